"""The formulas in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..precision import GROUP, QUANTIZED_MAXIMUM, SMALLEST_MAXIMUM, wide


def quantize_rows(x: torch.Tensor, dtype: torch.dtype, grouped: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric absmax quantization, `scale = max|x| / 127` (int8) or `/ 448` (e4m3fn) and `round(x / scale)`, half to
    even, for each row or each `GROUP` columns of one, of which the last may be narrower. As a kernel computes it: one
    division for a scale, and products with what it gives and with 1 / 127.

    Zeros stay zeros: a maximum below `SMALLEST_MAXIMUM` counts as that. Where the maximum is not finite the scale is
    NaN and the numbers are zeros: whatever is computed from them is NaN, whole rows of it, and can be found.
    """
    x = wide(x)
    columns = x.shape[-1]
    size = GROUP if grouped else max(columns, 1)
    parts = F.pad(x, (0, -columns % size)).unflatten(-1, (-1, size))
    maximum = parts.abs().amax(-1, keepdim=True)
    finite = maximum.isfinite()
    maximum = maximum.clamp(min=SMALLEST_MAXIMUM)
    largest = QUANTIZED_MAXIMUM[dtype]
    numbers = torch.where(finite, parts * (maximum.new_tensor(largest) / maximum), 0.0).flatten(-2)[..., :columns]
    numbers = numbers.round() if dtype == torch.int8 else numbers
    scales = torch.where(finite, maximum * (1 / largest), float("nan")).squeeze(-1)
    return numbers.to(dtype).contiguous(), scales if grouped else scales.squeeze(-1)


def scaled_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`activation((x * x_scale) @ (weight * weight_scale)^T + bias)`, the products of 8-bit numbers exact.

    fp64 holds every sum of them exactly, those of int8 as the integers that they are. To an 8-bit `out_dtype` the
    result goes by `quantize_rows` in groups, from fp32.
    """
    x, weight = x.double(), weight.double()
    if x_scale.ndim == x.ndim:
        by_column = x_scale.double().repeat_interleave(GROUP, dim=-1)[..., : x.shape[-1]]
        products = (x * by_column) @ weight.T
    else:
        products = (x @ weight.T) * x_scale.double()[..., None]
    result = products * weight_scale.double()
    result = result if bias is None else result + bias.double()
    result = result if activation is None else F.gelu(result, approximate="tanh")
    if out_dtype in QUANTIZED_MAXIMUM:
        return quantize_rows(result.float(), out_dtype, grouped=True)
    return result.to(out_dtype)
