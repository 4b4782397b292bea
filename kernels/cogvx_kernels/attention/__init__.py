"""Attention over all tokens of the joint stream."""

from __future__ import annotations

import torch

from .._triton import kernels_of
from ..checks import check_impl, check_triton
from . import cpu, reference

gpu = kernels_of(__name__)


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None, impl: str = "torch"
) -> torch.Tensor:
    """Non-causal attention, `softmax(scale * query @ key^T) @ value` for each head.

    Args:
        query: `(batch, sequence, heads, head_dim)`.
        key, value: `(batch, key_sequence, heads, head_dim)` of the same dtype, any strides with a contiguous last axis.
        scale: None for `head_dim ** -0.5`.
        impl: "torch", or "amx" or "avx512": bf16 and head dim 64 on a CPU, for which `ops.why_unavailable` is
            None. fp32 scores and sums, probabilities rounded to bf16; or "triton": fp16 or bf16, head dim 64 or 128 and
            a positive scale on a GPU, computed in the same way. Only "torch" has a backward pass.

    Returns:
        A new tensor of the shape and dtype of `query`.

    Raises:
        ValueError: for shapes or dtypes that do not fit, or an unknown `impl`.
    """
    check_impl("attention", impl)
    batch, _, heads, head_dim = query.shape if query.ndim == 4 else (0, 0, 0, 0)
    fits = key.ndim == 4 and key.shape[1] > 0 and (key.shape[0], *key.shape[2:]) == (batch, heads, head_dim)
    if not fits or value.shape != key.shape or query.ndim != 4:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        raise ValueError(
            "attention: query must be (batch, sequence, heads, head_dim), key and value (batch, key_sequence, heads,"
            f" head_dim) with at least one key, got {shapes}"
        )
    scale = head_dim**-0.5 if scale is None else scale
    if impl == "torch":
        return reference.attention(query, key, value, scale)
    if impl == "triton":
        check_triton("attention", query, key, value)
        dtypes = {query.dtype, key.dtype, value.dtype}
        if head_dim not in gpu.HEAD_DIMS or len(dtypes) > 1 or query.dtype not in gpu.DTYPES or scale <= 0:
            raise ValueError(
                f'attention: impl="triton" takes {" or ".join(map(str, gpu.DTYPES))}, head dims'
                f" {', '.join(map(str, gpu.HEAD_DIMS))} and a positive scale, got"
                f" {', '.join(sorted(map(str, dtypes)))}, head dim {head_dim} and scale {scale}"
            )
        return gpu.attention(query, key, value, scale)
    if head_dim != cpu.HEAD_DIM or {query.dtype, key.dtype, value.dtype} != {torch.bfloat16}:
        raise ValueError(
            f'attention: impl="{impl}" takes bfloat16 and head dim {cpu.HEAD_DIM}, got'
            f" {query.dtype}, {key.dtype}, {value.dtype} and head dim {head_dim}"
        )
    if any(tensor.stride(3) != 1 for tensor in (query, key, value)):
        raise ValueError(f'attention: impl="{impl}" takes tensors whose last axis is contiguous')
    return cpu.attention(query, key, value, scale, impl)
