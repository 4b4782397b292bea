"""What the autoencoder takes and gives: shapes, places, and numbers that are none."""

from __future__ import annotations

from typing import Any

import torch

from ..config import shown
from ..family import decoded_frames, latent_frames


def check_input(name: str, tensor: torch.Tensor, channels: int, smallest: int) -> None:
    """Whether latents or pixels have a shape that the autoencoder takes: `(batch, channels, time, height, width)`.

    Args:
        name: of the argument, as the caller knows it.
        smallest: height and width that the layers can still work on.

    Raises:
        TypeError: for anything but a tensor.
        ValueError: for a wrong rank or number of channels, an empty axis and a frame that is too small.
    """
    check_layout(name, tensor, channels, axis=1)
    shape = tuple(tensor.shape)
    if min(shape[3:]) < smallest:
        raise ValueError(f"{name} must be at least {smallest} high and wide, got {shape[3]}x{shape[4]}")


def check_layout(name: str, tensor: torch.Tensor, channels: int, axis: int) -> None:
    """Raise for what is no video with `channels` in `axis`, 1 or 2; the other one of these is its time.

    Raises:
        TypeError, ValueError: as `check_input`.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    shape, layouts = tuple(tensor.shape), ("batch, channels, time", "batch, time, channels")
    own, other = layouts if axis == 1 else layouts[::-1]
    if tensor.ndim != 5:
        raise ValueError(f"{name} must be ({own}, height, width), got {tensor.ndim} axes: {shape}")
    if shape[axis] != channels:
        looks = f"; they look like ({other}, height, width): permute(0, 2, 1, 3, 4) turns them"
        hint = looks if shape[3 - axis] == channels else ""
        raise ValueError(
            f"{name} must have {channels} channels in axis {axis}, got {shape[axis]} in shape {shape}{hint}"
        )
    if 0 in shape:
        raise ValueError(f"{name} must have no empty axis, got shape {shape}")


def check_latents(latents: torch.Tensor, vae: Any) -> None:
    """Raise for what is no latents of a pipeline, `(batch, time, channels, height, width)`, or without an autoencoder.

    Raises:
        TypeError, ValueError: as `check_input`.
    """
    if vae is None:
        raise ValueError("this pipeline has no autoencoder to decode latents with: its vae is None")
    if not isinstance(latents, torch.Tensor):
        raise TypeError(f"latents={shown(latents)} must be a tensor, got {type(latents).__name__}")
    check_layout("latents", latents, vae.config.latent_channels, axis=2)


def check_num_frames(num_frames: int, held: int) -> None:
    """Raise unless the autoencoder makes `num_frames` of the last of `held` latent frames."""
    if not isinstance(num_frames, int) or isinstance(num_frames, bool):
        raise TypeError(f"num_frames={shown(num_frames)} must be a whole number or None")
    most = decoded_frames(held)
    if 1 <= num_frames <= most and num_frames == decoded_frames(latent_frames(num_frames)):
        return
    possible = list(map(decoded_frames, range(1, held + 1)))
    below, above = (list(filter(side, possible)) for side in (num_frames.__gt__, num_frames.__lt__))
    nearest = [*below[-1:], *above[:1]]
    raise ValueError(
        f"num_frames={shown(num_frames)} must be 8N + 1 or 8N, at most {most}, which is what these latents hold;"
        f" nearest: {' or '.join(map(str, nearest))}"
    )


def check_place(name: str, tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Raise a ValueError for latents or pixels of another dtype than the autoencoder's, or on another device."""
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, as the autoencoder is, got {tensor.dtype}; .to({dtype}) converts")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, where the autoencoder is, got {tensor.device}")


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise a ValueError for latents or pixels that are NaN or infinite, and say where that comes from."""
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} must be finite, got {_count_bad(tensor)}; {_likely_cause(tensor)}")


def check_frames(frames: torch.Tensor) -> None:
    """Raise a ValueError for decoded frames that are NaN or infinite: a video of them would be gray or black.

    One pass that writes nothing: the least and the largest number are NaN where one is.
    """
    if frames.numel() and not torch.stack(torch.aminmax(frames)).isfinite().all():
        half = frames.dtype == torch.float16
        raise ValueError(
            f"the decoded frames must be finite, got {_count_bad(frames)}; the likely cause is"
            + (" overflow: float16 ends at 65504; decode in bfloat16 or float32" if half else " a damaged autoencoder")
        )


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
