"""LayerNorm over each head of Q and K, with rotary positions."""

from __future__ import annotations

import torch

from .._triton import kernels_of
from ..checks import CPU_DTYPES, check_head_dim, check_impl, check_triton
from . import cpu, reference

gpu = kernels_of(__name__)


def norm_rope(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    text_length: int,
    eps: float = 1e-6,
    impl: str = "torch",
) -> torch.Tensor:
    """LayerNorm over each head of Q or K, and rotary positions on the video rows.

    Args:
        x: `(batch, sequence, heads, head_dim)` of any strides with a contiguous last axis.
        weight, bias: `(head_dim,)` or None.
        rotary: cosines and sines, fp32 `(sequence - text_length, head_dim)`, pairs of neighbours alike; None: no
            rotation.

    Returns:
        A new contiguous tensor of the shape and dtype of `x`.

    Raises:
        ValueError: for shapes that do not fit or an unknown `impl`.
    """
    check_impl("norm_rope", impl)
    check_norm_rope("norm_rope", x, rotary, text_length)
    if impl == "torch":
        return reference.norm_rope(x, weight, bias, rotary, text_length, eps)
    tables = (None, None) if rotary is None else (table.float().contiguous() for table in rotary)
    if impl == "triton":
        check_triton("norm_rope", x, weight, bias)
        check_head_dim("norm_rope", x.shape[3])
        return gpu.norm_rope(x, weight, bias, *tables, text_length, eps)
    if (
        x.dtype not in CPU_DTYPES
        or x.stride(3) != 1
        or any(v is not None and v.dtype != x.dtype for v in (weight, bias))
    ):
        raise ValueError(
            f'norm_rope: impl="cpu" takes {" or ".join(map(str, CPU_DTYPES))} with weights of the same dtype and a'
            f" contiguous last axis, got {x.dtype}"
        )
    return cpu.norm_rope(x, weight, bias, *tables, text_length, eps)


def qk_norm_rope(
    query: torch.Tensor,
    key: torch.Tensor,
    query_weight: torch.Tensor | None,
    query_bias: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    text_length: int,
    eps: float = 1e-6,
    impl: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm_rope` of Q and of K, which have one shape; "triton" does both in one launch."""
    check_impl("qk_norm_rope", impl)
    check_norm_rope("qk_norm_rope", query, rotary, text_length)
    if key.shape != query.shape:
        raise ValueError(
            f"qk_norm_rope: key must have the shape of query, {tuple(query.shape)}, got {tuple(key.shape)}"
        )
    affine = (query_weight, query_bias, key_weight, key_bias)
    if impl == "torch":
        return reference.qk_norm_rope(query, key, *affine, rotary, text_length, eps)
    if impl == "triton":
        check_triton("qk_norm_rope", query, key, *affine)
        check_head_dim("qk_norm_rope", query.shape[3])
        tables = (None, None) if rotary is None else (table.float().contiguous() for table in rotary)
        return gpu.qk_norm_rope(query, key, *affine, *tables, text_length, eps)
    return (
        norm_rope(query, query_weight, query_bias, rotary, text_length, eps, impl),
        norm_rope(key, key_weight, key_bias, rotary, text_length, eps, impl),
    )


def check_norm_rope(
    operation: str, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None, text_length: int
) -> None:
    if x.ndim != 4 or not 0 <= text_length <= x.shape[1]:
        raise ValueError(
            f"{operation}: x must be (batch, sequence, heads, head_dim) and text_length at most the sequence, got"
            f" {tuple(x.shape)} and {text_length}"
        )
    if rotary is not None:
        expected = (x.shape[1] - text_length, x.shape[3])
        if x.shape[3] % 2 or any(tuple(table.shape) != expected for table in rotary):
            shapes = " and ".join(str(tuple(table.shape)) for table in rotary)
            raise ValueError(f"{operation}: rotary must be two tables {expected} with an even head dim, got {shapes}")
