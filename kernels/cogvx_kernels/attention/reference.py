"""The formula in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017) over `(batch, sequence, heads, head_dim)`."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)
