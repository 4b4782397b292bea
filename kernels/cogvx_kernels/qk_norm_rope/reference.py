"""The formulas in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..precision import wide, wide_or_none


def norm_rope(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    text_length: int,
    eps: float,
) -> torch.Tensor:
    """LayerNorm over each head; past `text_length`, channels (2i, 2i + 1) rotate by the position's angle i (RoPE,
    arXiv:2104.09864, in 3-D as CogVideoX has it)."""
    normed = F.layer_norm(wide(x), x.shape[-1:], wide_or_none(weight), wide_or_none(bias), eps)
    if rotary is not None:
        cosines, sines = (table[:, None] for table in rotary)  # (tokens, 1, head_dim)
        video = normed[:, text_length:]
        turned = torch.stack([-video[..., 1::2], video[..., ::2]], dim=-1).flatten(3)
        normed = torch.cat([normed[:, :text_length], video * cosines + turned * sines], dim=1)
    return normed.to(x.dtype).contiguous()


def qk_norm_rope(
    query: torch.Tensor,
    key: torch.Tensor,
    query_weight: torch.Tensor | None,
    query_bias: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    text_length: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm_rope` of Q and of K, each with its own affine."""
    return (
        norm_rope(query, query_weight, query_bias, rotary, text_length, eps),
        norm_rope(key, key_weight, key_bias, rotary, text_length, eps),
    )
