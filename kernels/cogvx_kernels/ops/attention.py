"""Operations on queries, keys and values: norms with rotary positions, and attention."""

from __future__ import annotations

import torch

from .. import reference
from ..cpu import attention as cpu_attention
from ..cpu import stream as cpu
from .checks import check_head_dim, check_impl, check_triton, gpu


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
        x.dtype not in cpu.DTYPES
        or x.stride(3) != 1
        or any(v is not None and v.dtype != x.dtype for v in (weight, bias))
    ):
        raise ValueError(
            f'norm_rope: impl="cpu" takes {" or ".join(map(str, cpu.DTYPES))} with weights of the same dtype and a'
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


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None, impl: str = "torch"
) -> torch.Tensor:
    """Non-causal attention, `softmax(scale * query @ key^T) @ value` for each head.

    Args:
        query: `(batch, sequence, heads, head_dim)`.
        key, value: `(batch, key_sequence, heads, head_dim)` of the same dtype, any strides with a contiguous last axis.
        scale: None for `head_dim ** -0.5`.
        impl: "torch", or "amx" or "avx512": bf16 and head dim 64 on a CPU, if `cpu.attention.why_unavailable(impl)` is
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
        if head_dim not in gpu.HEAD_DIMS or len(dtypes) > 1 or query.dtype not in gpu.ATTENTION_DTYPES or scale <= 0:
            raise ValueError(
                f'attention: impl="triton" takes {" or ".join(map(str, gpu.ATTENTION_DTYPES))}, head dims'
                f" {', '.join(map(str, gpu.HEAD_DIMS))} and a positive scale, got"
                f" {', '.join(sorted(map(str, dtypes)))}, head dim {head_dim} and scale {scale}"
            )
        return gpu.attention(query, key, value, scale)
    if head_dim != cpu_attention.HEAD_DIM or {query.dtype, key.dtype, value.dtype} != {torch.bfloat16}:
        raise ValueError(
            f'attention: impl="{impl}" takes bfloat16 and head dim {cpu_attention.HEAD_DIM}, got'
            f" {query.dtype}, {key.dtype}, {value.dtype} and head dim {head_dim}"
        )
    if any(tensor.stride(3) != 1 for tensor in (query, key, value)):
        raise ValueError(f'attention: impl="{impl}" takes tensors whose last axis is contiguous')
    return cpu_attention.attention(query, key, value, scale, impl)
