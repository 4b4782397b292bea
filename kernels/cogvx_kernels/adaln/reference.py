"""The formulas in plain torch: what every other implementation is tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..precision import wide, wide_or_none
from ..w8a8_linear.reference import quantize_rows


def _by_expert(vectors: torch.Tensor, text_length: int, sequence: int) -> torch.Tensor:
    """Each row's own vector: `(1 or batch, 2, dim)` to `(1 or batch, sequence, dim)`."""
    text, video = wide(vectors[:, :1]), wide(vectors[:, 1:])
    return torch.cat([text.expand(-1, text_length, -1), video.expand(-1, sequence - text_length, -1)], dim=1)


def layer_norm_modulate(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    text_length: int,
    eps: float = 1e-5,
    quantize: torch.dtype | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Expert AdaLN (CogVideoX, arXiv:2408.06072, 2.2): `LayerNorm(x) * (1 + scale[row]) + shift[row]`; with `quantize`
    its `quantize_rows`, from fp32, in its place."""
    normed = F.layer_norm(wide(x), x.shape[-1:], wide_or_none(weight), wide_or_none(bias), eps)
    scale, shift = (_by_expert(vectors, text_length, x.shape[1]) for vectors in (scale, shift))
    modulated = torch.addcmul(shift, normed, 1 + scale)
    return modulated.to(x.dtype) if quantize is None else quantize_rows(modulated, quantize)


def gated_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, text_length: int) -> torch.Tensor:
    """`x + gate[row] * y`."""
    return torch.addcmul(wide(x), _by_expert(gate, text_length, x.shape[1]), wide(y)).to(x.dtype)


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
    quantize: torch.dtype | None = None,
) -> tuple[torch.Tensor, ...]:
    """`x' = gated_residual(x, y, gate)` and `layer_norm_modulate(x', ...)`, both returned."""
    x = gated_residual(x, y, gate, text_length)
    normed = layer_norm_modulate(x, weight, bias, shift, scale, text_length, eps, quantize)
    return (x, normed) if isinstance(normed, torch.Tensor) else (x, *normed)
