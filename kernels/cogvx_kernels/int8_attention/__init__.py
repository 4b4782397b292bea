"""Attention with Q and K in 8 bits, and what puts them there."""

from __future__ import annotations

import torch

from .._triton import kernels_of
from ..checks import check_e4m3, check_head_dim, check_impl, check_triton
from ..qk_norm_rope import check_norm_rope
from . import reference

gpu = kernels_of(__name__)
qk = kernels_of(__name__, "triton_quantize_qk")
rope = kernels_of(__name__, "triton_qk_norm_rope")
values = kernels_of(__name__, "triton_quantize_value")

_HALF = (torch.float16, torch.bfloat16)
# The largest of `qk_norm_rope_int8` by "triton": 128 channels spill on sm_100, in 8 warps and in 16.
FUSED_HEAD_DIM = 64


def quantize_qk(
    query: torch.Tensor, key: torch.Tensor, scale: float | None = None, impl: str = "torch"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q times `scale * log2(e)`, and K without its mean, that of `reference.SAMPLES` = 64 rows at most over the
    sequence, in 8 bits with a scale for each 128 rows.

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
    if query.ndim != 4 or key.shape[:1] + key.shape[2:] != query.shape[:1] + query.shape[2:] or key.shape[1] == 0:
        raise ValueError(
            "quantize_qk: query must be (batch, sequence, heads, head_dim) and key (batch, key_sequence, heads,"
            f" head_dim) with at least one key, got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    scale = _checked_scale("quantize_qk", scale, query.shape[3])
    if impl == "torch":
        return reference.quantize_qk(query, key, scale)
    check_triton("quantize_qk", query, key)
    check_head_dim("quantize_qk", query.shape[3])
    return qk.quantize_qk(query, key, scale * reference.LOG2_E)


def qk_norm_rope_int8(
    query: torch.Tensor,
    key: torch.Tensor,
    query_weight: torch.Tensor | None,
    query_bias: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    text_length: int,
    eps: float = 1e-6,
    scale: float | None = None,
    impl: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`quantize_qk` of what `qk_norm_rope` gives, without rounding that in between; "triton" does not write it at all.

    Arguments are those of `qk_norm_rope`, and the `scale` of `quantize_qk`; so is what is returned and raised. "triton"
    takes head dims up to `FUSED_HEAD_DIM`.
    """
    check_impl("qk_norm_rope_int8", impl)
    check_norm_rope("qk_norm_rope_int8", query, rotary, text_length)
    if key.shape != query.shape:
        raise ValueError(
            f"qk_norm_rope_int8: key must have the shape of query, {tuple(query.shape)}, got {tuple(key.shape)}"
        )
    scale = _checked_scale("qk_norm_rope_int8", scale, query.shape[3])
    affine = (query_weight, query_bias, key_weight, key_bias)
    if impl == "torch":
        return reference.qk_norm_rope_int8(query, key, *affine, rotary, text_length, eps, scale)
    check_triton("qk_norm_rope_int8", query, key, *affine)
    check_head_dim("qk_norm_rope_int8", query.shape[3])
    if query.shape[3] > FUSED_HEAD_DIM:
        raise ValueError(
            f'qk_norm_rope_int8: impl="triton" takes head dims up to {FUSED_HEAD_DIM}, got {query.shape[3]}; use'
            " qk_norm_rope and quantize_qk"
        )
    tables = (None, None) if rotary is None else (table.float().contiguous() for table in rotary)
    return rope.qk_norm_rope_int8(query, key, *affine, *tables, text_length, eps, scale * reference.LOG2_E)


def quantized_attention(
    query_int8: torch.Tensor,
    query_scale: torch.Tensor,
    key_int8: torch.Tensor,
    key_scale: torch.Tensor,
    value: torch.Tensor,
    value_dtype: torch.dtype | None = None,
    smooth_value: bool = False,
    guard: torch.Tensor | None = None,
    impl: str = "torch",
) -> torch.Tensor:
    """Non-causal attention of what `quantize_qk` or `qk_norm_rope_int8` gave; sums are fp32.

    A number that was not finite in Q or K, or is not in V, makes outputs NaN or infinite, those of its block of queries
    or all of its head: none is lost in 8 bits.

    Args:
        query_int8: `(batch, sequence, heads, head_dim)`, and `query_scale` `(batch, heads, ceil(sequence / 128))`.
        key_int8, key_scale: the same, of `(batch, key_sequence, heads, head_dim)`.
        value: fp16 or bf16 of the shape of K, any strides with a contiguous last axis.
        value_dtype: of V and the probabilities in their product: None for V's own, or `torch.float8_e4m3fn` with a
            scale for each channel, for which "triton" needs a GPU of compute capability 8.9 or more.
        smooth_value: take V's mean over the sequence off before it is rounded, and add it to the output. In 8 bits, a
            large common offset would leave few bits for what differs; in 16 it only rounds V once more.
        guard: int32 of one element on the device of Q: set to 1 if a number of the output is not finite, and left as
            it is otherwise. Reading it is up to the caller: the operation does not wait for the device.
        impl: "torch", or "triton": head dim 64 or 128 on a GPU.

    Returns:
        A new tensor of the shape of Q and the dtype of V.

    Raises:
        ValueError: for shapes or dtypes that do not fit, or an unknown `impl`.
    """
    check_impl("quantized_attention", impl)
    _check_quantized(query_int8, query_scale, key_int8, key_scale, value)
    value_dtype = value.dtype if value_dtype is None else value_dtype
    if value_dtype not in (value.dtype, torch.float8_e4m3fn):
        raise ValueError(
            f"quantized_attention: value_dtype={value_dtype} must be that of value, {value.dtype}, or"
            " torch.float8_e4m3fn"
        )
    device = query_int8.device
    if guard is not None and (guard.dtype, guard.numel(), guard.device) != (torch.int32, 1, device):
        raise ValueError(
            f"quantized_attention: guard must be one torch.int32 on {device}, got {guard.numel()} of {guard.dtype} on"
            f" {guard.device}"
        )
    quantized = (query_int8, query_scale, key_int8, key_scale)
    if impl == "torch":
        output = reference.quantized_attention(*quantized, value, value_dtype, smooth_value)
        if guard is not None:
            guard.clamp_(min=(~output.isfinite()).any().to(torch.int32))
        return output
    check_triton("quantized_attention", value)
    if query_int8.shape[3] not in gpu.HEAD_DIMS:
        raise ValueError(
            f'quantized_attention: impl="triton" takes head dims {", ".join(map(str, gpu.HEAD_DIMS))}, got'
            f" {query_int8.shape[3]}"
        )
    if value_dtype is torch.float8_e4m3fn:
        check_e4m3("quantized_attention", "value_dtype", value_dtype, device)
    dtype, value_scale, value_mean = value.dtype, None, None
    if smooth_value or value_dtype != dtype:
        value, value_scale, value_mean = values.quantize_value(value, value_dtype, smooth_value)
        value_scale = value_scale if value_dtype.itemsize == 1 else None
        value_mean = value_mean if smooth_value else None
    return gpu.int8_attention(*quantized, value, value_scale, value_mean, guard, dtype)


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
    """`quantized_attention` of `quantize_qk`: attention whose scores come from Q and K in 8 bits.

    Args:
        query: `(batch, sequence, heads, head_dim)`, fp16 or bf16.
        key, value: `(batch, key_sequence, heads, head_dim)` of the same dtype, any strides with a contiguous last axis.
        scale: positive; None for `head_dim ** -0.5`.

    The other arguments, what is returned and what is raised are those of `quantized_attention`.
    """
    check_impl("int8_attention", impl)
    dtypes = {query.dtype, key.dtype, value.dtype}
    if len(dtypes) > 1 or query.dtype not in _HALF:
        raise ValueError(
            f"int8_attention: query, key and value must be all {' or all '.join(map(str, _HALF))}, got"
            f" {', '.join(sorted(map(str, dtypes)))}"
        )
    return quantized_attention(*quantize_qk(query, key, scale, impl), value, value_dtype, smooth_value, guard, impl)


def _check_quantized(
    query: torch.Tensor, query_scale: torch.Tensor, key: torch.Tensor, key_scale: torch.Tensor, value: torch.Tensor
) -> None:
    def scales(x: torch.Tensor) -> tuple[int, ...]:
        return x.shape[0], x.shape[2], -(-x.shape[1] // reference.BLOCK_ROWS)

    fits = query.ndim == key.ndim == 4 and key.shape[:1] + key.shape[2:] == query.shape[:1] + query.shape[2:]
    fits = fits and key.shape[1] > 0 and value.shape == key.shape
    if not fits or query_scale.shape != scales(query) or key_scale.shape != scales(key):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, query_scale, key, key_scale, value))
        raise ValueError(
            "quantized_attention: Q must be (batch, sequence, heads, head_dim), K and value (batch, key_sequence,"
            f" heads, head_dim) with at least one key, scales (batch, heads, blocks of {reference.BLOCK_ROWS} rows),"
            f" got {shapes}"
        )
    dtypes = [tensor.dtype for tensor in (query, key, query_scale, key_scale, value)]
    if dtypes[:4] != [torch.int8] * 2 + [torch.float32] * 2 or dtypes[4] not in _HALF:
        raise ValueError(
            "quantized_attention: Q and K must be torch.int8, scales torch.float32 and value"
            f" {' or '.join(map(str, _HALF))}, got {', '.join(map(str, dtypes))}"
        )


def _checked_scale(operation: str, scale: float | None, head_dim: int) -> float:
    scale = head_dim**-0.5 if scale is None else scale
    if scale <= 0:
        raise ValueError(f"{operation}: scale must be positive, got {scale}")
    return scale
