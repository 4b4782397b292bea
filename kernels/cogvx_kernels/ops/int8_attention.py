"""Attention with Q and K in 8 bits, and what puts them there."""

from __future__ import annotations

import torch

from .. import reference
from .checks import check_impl, check_triton, gpu

_HALF = (torch.float16, torch.bfloat16)
VALUE_DTYPES = (*_HALF, torch.float8_e4m3fn)


def quantize_qk(
    query: torch.Tensor, key: torch.Tensor, scale: float | None = None, impl: str = "torch"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q times `scale * log2(e)`, and K without its mean over the sequence, in 8 bits with a scale for each 128 rows.

    Args:
        query: `(batch, sequence, heads, head_dim)`, any strides with a contiguous last axis.
        key: `(batch, key_sequence, heads, head_dim)`.
        scale: that of the softmax, positive; None for `head_dim ** -0.5`.

    Returns:
        `query_int8, query_scale, key_int8, key_scale`: int8 of the shapes of Q and K (from "triton", each head's rows
        are neighbours in memory), and fp32 `(batch, heads, ceil(sequence / 128))`.

    Raises:
        ValueError: for shapes that do not fit, a scale that is not positive, or an unknown `impl`.
    """
    check_impl("quantize_qk", impl)
    _check_shapes("quantize_qk", query, key, key)
    scale = _checked_scale("quantize_qk", scale, query.shape[3])
    if impl == "torch":
        return reference.quantize_qk(query, key, scale)
    check_triton("quantize_qk", query, key)
    _check_head_dim("quantize_qk", query.shape[3])
    return gpu.quantize_qk(query, key, scale * reference.LOG2_E)


def int8_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None = None,
    value_dtype: torch.dtype | None = None,
    smooth_value: bool = False,
    guard: torch.Tensor | None = None,
    impl: str = "torch",
) -> torch.Tensor:
    """Non-causal attention whose scores come from Q and K in 8 bits (`quantize_qk`); sums are fp32.

    A number that is not finite in Q, K or V makes outputs NaN or infinite, those of its block of queries or all of its
    head: none is lost in 8 bits.

    Args:
        query: `(batch, sequence, heads, head_dim)`, fp16 or bf16.
        key, value: `(batch, key_sequence, heads, head_dim)` of the same dtype, any strides with a contiguous last axis.
        scale: positive; None for `head_dim ** -0.5`.
        value_dtype: of V and the probabilities in their product: None for V's own, or `torch.float8_e4m3fn` with a
            scale for each channel, for which "triton" needs a GPU of compute capability 8.9 or more.
        smooth_value: take V's mean over the sequence off before it is rounded, and add it to the output. Changes next
            to nothing in 16 bits; in 8, a large common offset would leave few bits for what differs.
        guard: int32 of one element on the device of Q: set to 1 if a number of the output is not finite, and left as
            it is otherwise. Reading it is up to the caller: the operation does not wait for the device.
        impl: "torch", or "triton": head dim 64 or 128 on a GPU.

    Returns:
        A new tensor of the shape and dtype of `query`.

    Raises:
        ValueError: for shapes or dtypes that do not fit, or an unknown `impl`.
    """
    check_impl("int8_attention", impl)
    _check_shapes("int8_attention", query, key, value)
    scale = _checked_scale("int8_attention", scale, query.shape[3])
    dtypes = {query.dtype, key.dtype, value.dtype}
    if len(dtypes) > 1 or query.dtype not in _HALF:
        raise ValueError(
            f"int8_attention: query, key and value must be all {' or all '.join(map(str, _HALF))}, got"
            f" {', '.join(sorted(map(str, dtypes)))}"
        )
    value_dtype = value.dtype if value_dtype is None else value_dtype
    if value_dtype not in (value.dtype, torch.float8_e4m3fn):
        raise ValueError(
            f"int8_attention: value_dtype={value_dtype} must be that of value, {value.dtype}, or torch.float8_e4m3fn"
        )
    if guard is not None and (guard.dtype, guard.numel(), guard.device) != (torch.int32, 1, query.device):
        raise ValueError(
            f"int8_attention: guard must be one torch.int32 on {query.device}, got {guard.numel()} of {guard.dtype} on"
            f" {guard.device}"
        )
    if impl == "torch":
        output = reference.int8_attention(query, key, value, scale, value_dtype, smooth_value)
        if guard is not None:
            guard.clamp_(min=(~output.isfinite()).any().to(torch.int32))
        return output
    check_triton("int8_attention", query, key, value)
    _check_head_dim("int8_attention", query.shape[3])
    if value_dtype is torch.float8_e4m3fn and (reason := gpu.why_no_fp8(query.device)) is not None:
        raise ValueError(f"int8_attention: value_dtype={value_dtype} cannot work here: {reason}")
    quantized = gpu.quantize_qk(query, key, scale * reference.LOG2_E)
    value_scale = value_mean = None
    if smooth_value or value_dtype != value.dtype:
        value, value_scale, value_mean = gpu.quantize_value(value, value_dtype, smooth_value)
        value_scale = value_scale if value_dtype.itemsize == 1 else None
        value_mean = value_mean if smooth_value else None
    return gpu.int8_attention(*quantized, value, value_scale, value_mean, guard, query.dtype)


def _check_shapes(operation: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    fits = query.ndim == key.ndim == 4 and key.shape == (query.shape[0], key.shape[1], *query.shape[2:])
    if not fits or key.shape[1] == 0 or value.shape != key.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        raise ValueError(
            f"{operation}: query must be (batch, sequence, heads, head_dim), key and value (batch, key_sequence, heads,"
            f" head_dim) with at least one key, got {shapes}"
        )


def _checked_scale(operation: str, scale: float | None, head_dim: int) -> float:
    scale = head_dim**-0.5 if scale is None else scale
    if scale <= 0:
        raise ValueError(f"{operation}: scale must be positive, got {scale}")
    return scale


def _check_head_dim(operation: str, head_dim: int) -> None:
    if head_dim not in gpu.HEAD_DIMS:
        raise ValueError(
            f'{operation}: impl="triton" takes head dims {", ".join(map(str, gpu.HEAD_DIMS))}, got {head_dim}'
        )
