"""What is refused before any work is done, with what is wrong and what would be right."""

from __future__ import annotations

import torch


def check_input(
    name: str,
    tensor: torch.Tensor,
    channels: int,
    smallest: int,
    dtype: torch.dtype | None,
    device: torch.device | None,
) -> None:
    """Latents or pixels as the autoencoder takes them: `(batch, channels, time, height, width)`.

    Args:
        name: of the argument, as the caller knows it.
        smallest: height and width that the layers can still work on.
        dtype, device: of the autoencoder; None: not checked.

    Raises:
        TypeError: for anything but a tensor.
        ValueError: for a wrong rank, number of channels, dtype or device, an empty axis, a frame that is too small,
            and for NaN or infinite values.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    shape = tuple(tensor.shape)
    if tensor.ndim != 5:
        raise ValueError(f"{name} must be (batch, channels, time, height, width), got {tensor.ndim} axes: {shape}")
    if shape[1] != channels:
        hint = ""
        if shape[2] == channels:
            hint = "; they look like (batch, time, channels, height, width): permute(0, 2, 1, 3, 4) turns them"
        raise ValueError(f"{name} must have {channels} channels in axis 1, got {shape[1]} in shape {shape}{hint}")
    if 0 in shape:
        raise ValueError(f"{name} must have no empty axis, got shape {shape}")
    if min(shape[3:]) < smallest:
        raise ValueError(f"{name} must be at least {smallest} high and wide, got {shape[3]}x{shape[4]}")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, as the autoencoder is, got {tensor.dtype}; .to({dtype}) converts")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device}, where the autoencoder is, got {tensor.device}")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} must be finite, got {_count_bad(tensor)}; {_likely_cause(tensor)}")


def _count_bad(tensor: torch.Tensor) -> str:
    nan, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    return f"{nan} NaN and {infinite} infinite of {tensor.numel()} values"


def _likely_cause(tensor: torch.Tensor) -> str:
    if tensor.dtype == torch.float16:
        return (
            "the likely cause is overflow: float16 ends at 65504, which CogVideoX-5b and 1.5 exceed; run the model in"
            " bfloat16"
        )
    return (
        "the likely cause is an overflow in what made them, such as a transformer in float16 (CogVideoX-5b and 1.5 want"
        " bfloat16), or damaged weights"
    )
