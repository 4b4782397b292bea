"""Public operations: check the arguments, then call the implementation the caller chose.

The formulas, with shapes, are in `reference.py`. There is no fallback: an implementation that does not
exist for an operation raises.
"""

from __future__ import annotations

import torch

from . import reference

IMPLEMENTATIONS = ("torch",)


def _check_impl(operation: str, impl: str) -> None:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is unknown to {operation}; allowed: {', '.join(map(repr, IMPLEMENTATIONS))}")


def _check_stream(operation: str, x: torch.Tensor, text_length: int) -> None:
    if x.ndim != 3:
        raise ValueError(f"{operation}: x must be (batch, sequence, dim), got shape {tuple(x.shape)}")
    if not 0 <= text_length <= x.shape[1]:
        raise ValueError(f"{operation}: text_length={text_length} must lie in 0..{x.shape[1]}, the sequence length")


def _check_expert_vectors(operation: str, x: torch.Tensor, **vectors: torch.Tensor) -> None:
    for name, vector in vectors.items():
        if vector.ndim != 3 or vector.shape[0] not in (1, x.shape[0]) or tuple(vector.shape[1:]) != (2, x.shape[2]):
            raise ValueError(
                f"{operation}: {name} must be (1 or {x.shape[0]}, 2, {x.shape[2]}), got shape {tuple(vector.shape)}"
            )


def layer_norm_modulate(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    text_length: int,
    eps: float = 1e-5,
    impl: str = "torch",
) -> torch.Tensor:
    """Expert AdaLN of the joint stream.

    Args:
        x: `(batch, sequence, dim)`, text rows first.
        weight, bias: `(dim,)` affine of the LayerNorm, or None.
        shift, scale: `(1 or batch, 2, dim)`, the text expert's at index 0, the video expert's at 1.
        text_length: how many leading rows are text.

    Returns:
        A new tensor of the shape and dtype of `x`.

    Raises:
        ValueError: for shapes that do not fit or an unknown `impl`.
    """
    _check_impl("layer_norm_modulate", impl)
    _check_stream("layer_norm_modulate", x, text_length)
    _check_expert_vectors("layer_norm_modulate", x, shift=shift, scale=scale)
    return reference.layer_norm_modulate(x, weight, bias, shift, scale, text_length, eps)


def gated_residual(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, text_length: int, impl: str = "torch"
) -> torch.Tensor:
    """`x + gate * y` with each row's own gate; shapes as in `layer_norm_modulate`, a new tensor is returned."""
    _check_impl("gated_residual", impl)
    _check_stream("gated_residual", x, text_length)
    _check_expert_vectors("gated_residual", x, gate=gate)
    if y.shape != x.shape:
        raise ValueError(f"gated_residual: y must have the shape of x, {tuple(x.shape)}, got {tuple(y.shape)}")
    return reference.gated_residual(x, y, gate, text_length)


def gated_residual_layer_norm_modulate(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    text_length: int,
    eps: float = 1e-5,
    impl: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x' = x + gate * y` and its expert AdaLN; returns `(x', normed)`, shapes as in `layer_norm_modulate`."""
    operation = "gated_residual_layer_norm_modulate"
    _check_impl(operation, impl)
    _check_stream(operation, x, text_length)
    _check_expert_vectors(operation, x, gate=gate, shift=shift, scale=scale)
    if y.shape != x.shape:
        raise ValueError(f"{operation}: y must have the shape of x, {tuple(x.shape)}, got {tuple(y.shape)}")
    return reference.gated_residual_layer_norm_modulate(x, y, gate, weight, bias, shift, scale, text_length, eps)
