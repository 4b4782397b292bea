"""The formula of `reference.quantize_rows`, for every kernel that writes 8-bit numbers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..precision import QUANTIZED_MAXIMUM, SMALLEST_MAXIMUM

_SMALLEST_MAXIMUM = tl.constexpr(SMALLEST_MAXIMUM)
_INT8_MAXIMUM = tl.constexpr(QUANTIZED_MAXIMUM[torch.int8])
_FP8_MAXIMUM = tl.constexpr(QUANTIZED_MAXIMUM[torch.float8_e4m3fn])
_INFINITY = tl.constexpr(0x7F800000)
_ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23


@triton.jit
def quantize(values, axis: tl.constexpr, dtype: tl.constexpr):
    """`(numbers, scales)` of fp32 `values` with one scale along `axis`; scales keep the axis, of length 1.

    The maximum is that of the bit patterns without their signs, as integers: they order as the numbers do, with
    infinity above all of them and NaN above it, where a maximum of numbers would pass NaN over.
    Adding 1.5 * 2^23 rounds to an integer, half to even, and leaves it in the low bits: a conversion instruction would
    do the same at an eighth of the rate.
    """
    bits = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=axis, keep_dims=True)
    finite = bits < _INFINITY
    maximum = tl.maximum(bits.to(tl.float32, bitcast=True), _SMALLEST_MAXIMUM)
    largest: tl.constexpr = _INT8_MAXIMUM if dtype == tl.int8 else _FP8_MAXIMUM
    scaled = tl.where(finite, values * tl.div_rn(largest, maximum), 0.0)
    scales = tl.where(finite, maximum * (1 / largest), float("nan"))
    if dtype == tl.int8:
        return (scaled + _ROUNDER).to(tl.int32, bitcast=True).to(tl.int8), scales
    return scaled.to(dtype), scales
