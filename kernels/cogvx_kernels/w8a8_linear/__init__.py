"""Operations on 8-bit numbers with scales: quantization of rows, and linear layers of what it gives."""

from __future__ import annotations

import torch

from .._triton import kernels_of
from ..checks import CPU_DTYPES, check_impl, check_quantized_dtype, check_triton, check_triton_device
from ..precision import GROUP, QUANTIZED_MAXIMUM
from . import cpu, reference
from .cpu import MAX_INT8_DIM, dequantize, gelu_quantize_rows, int8_products

gpu, rows = kernels_of(__name__), kernels_of(__name__, "triton_quantize_rows")

__all__ = [
    "MAX_INT8_DIM",
    "dequantize",
    "gelu_quantize_rows",
    "int8_products",
    "quantize_rows",
    "scaled_linear",
]

ACTIVATIONS = (None, "gelu_tanh")
OUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, *QUANTIZED_MAXIMUM)


def quantize_rows(
    x: torch.Tensor, dtype: torch.dtype, grouped: bool = False, impl: str = "torch"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric 8-bit numbers for each row, from its largest: `x` is about `numbers * scales[..., None]`.

    Args:
        x: `(..., columns)`; a weight `(out_features, in_features)` gets a scale for each output channel.
        dtype: `torch.int8` (the largest becomes 127, halves are rounded to even) or `torch.float8_e4m3fn` (448).
        grouped: a scale for each `reference.GROUP` = 128 columns of a row, and not for the whole row.
        impl: "torch"; "cpu": bf16 or fp32 rows to int8, not grouped; or "triton": fp16, bf16 or fp32 on a GPU; e4m3fn
            needs compute capability 8.9.

    Returns:
        `numbers` of the shape of `x`, and `scales`, fp32 `(...)` or grouped `(..., ceil(columns / 128))`. A row (or
        group) of zeros has a positive scale and zeros. One that holds an infinity or NaN has the scale NaN and zeros,
        so that every output computed from it is NaN.

    Raises:
        ValueError: for a dtype that is not one of these, no columns, or an unknown `impl`.
    """
    check_impl("quantize_rows", impl)
    check_quantized_dtype("quantize_rows", "dtype", dtype, x, impl)
    if x.ndim < 1 or x.shape[-1] == 0:
        raise ValueError(f"quantize_rows: x must be (..., columns) with at least one column, got {tuple(x.shape)}")
    if impl == "cpu":
        if grouped or dtype is not torch.int8 or x.dtype not in CPU_DTYPES:
            raise ValueError(
                f'quantize_rows: impl="cpu" takes {" or ".join(map(str, CPU_DTYPES))} to torch.int8 without groups, got'
                f" {x.dtype} to {dtype} with grouped={grouped}"
            )
        return cpu.quantize_rows(x)
    if impl == "triton":
        check_triton("quantize_rows", x)
        return rows.quantize_rows(x.contiguous(), dtype, grouped)
    return reference.quantize_rows(x, dtype, grouped)


def scaled_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    impl: str = "torch",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """A linear layer of 8-bit activations and weights: `activation((x * x_scale) @ (weight * weight_scale)^T + bias)`.

    int8 products are summed exactly, in int32; those of e4m3 in fp32, or 128 of them by the tensor core and then in
    fp32. Beside a linear layer in 16 bits it moves half the bytes of `x` and of `weight`, and its products run at the
    rate of 8-bit tensor cores, twice that of fp16. With an 8-bit `out_dtype` the output is a half as well, and there is
    no pass that quantizes it: 1 byte an element is written in place of 2 written, 2 read and 1 written. For the 7,680
    hidden features of CogVideoX-2b and the 35,552 rows of a default clip with guidance that saves 1.1 GB a layer. The
    number of operations is the same,
    `2 * rows * in_features * out_features`.

    Args:
        x: `(..., in_features)`, int8 or float8_e4m3fn.
        x_scale: fp32 `(...)`, one for each row, or `(..., ceil(in_features / 128))`, one for each 128 columns. Sums of
            groups are rescaled one by one, into fp32.
        weight: `(out_features, in_features)`, the layout of `nn.Linear`, of the dtype of `x`.
        weight_scale: fp32 `(out_features,)`.
        bias: `(out_features,)`, fp16, bf16 or fp32, or None.
        activation: None, or "gelu_tanh" as `F.gelu(..., approximate="tanh")`, in fp32.
        out_dtype: fp16, bf16 or fp32; or int8 or float8_e4m3fn: then the output is quantized from fp32 in groups, as
            `quantize_rows(..., grouped=True)` does, and goes with its scales into the next `scaled_linear`.
        impl: "torch" (in fp64, for checks, not for speed) or "triton": on a GPU, e4m3fn from compute capability 8.9.

    Returns:
        `(..., out_features)` in `out_dtype`; for an 8-bit one `(numbers, scales)`, `scales` fp32 `(...,
        ceil(out_features / 128))`.

    Raises:
        ValueError: for shapes or dtypes that do not fit, or an unknown `activation` or `impl`.
    """
    check_impl("scaled_linear", impl)
    check_quantized_dtype("scaled_linear", "x", x.dtype, x, impl)
    _check_scaled_linear(x, x_scale, weight, weight_scale, bias)
    if activation not in ACTIVATIONS or out_dtype not in OUT_DTYPES:
        raise ValueError(
            f"scaled_linear: activation must be one of {', '.join(map(repr, ACTIVATIONS))} and out_dtype one of"
            f" {', '.join(map(str, OUT_DTYPES))}, got {activation!r} and {out_dtype}"
        )
    if out_dtype in QUANTIZED_MAXIMUM:
        check_quantized_dtype("scaled_linear", "out_dtype", out_dtype, x, impl)
    if impl == "torch":
        return reference.scaled_linear(x, x_scale, weight, weight_scale, bias, activation, out_dtype)
    check_triton_device("scaled_linear", x)
    if not all(t.is_contiguous() for t in (weight, weight_scale)) or (bias is not None and bias.stride(0) != 1):
        raise ValueError('scaled_linear: impl="triton" takes a contiguous weight, weight_scale and bias')
    leading, columns = x.shape[:-1], weight.shape[0]
    output = torch.empty((*leading, columns), dtype=out_dtype, device=x.device)
    output_scale = None
    if out_dtype in QUANTIZED_MAXIMUM:
        output_scale = torch.empty((*leading, -(-columns // GROUP)), dtype=torch.float32, device=x.device)
    given = (x.contiguous(), x_scale.contiguous(), weight, weight_scale, bias)
    gpu.scaled_linear(*given, activation, output, output_scale)
    return output if output_scale is None else (output, output_scale)


def _check_scaled_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[-1] or 0 in weight.shape:
        raise ValueError(
            "scaled_linear: x must be (..., in_features) and weight (out_features, in_features), neither of them 0, got"
            f" {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if weight.dtype != x.dtype:
        raise ValueError(f"scaled_linear: weight must have the dtype of x, {x.dtype}, got {weight.dtype}")
    out_features, in_features = weight.shape
    by_row, by_group = tuple(x.shape[:-1]), (*x.shape[:-1], -(-in_features // GROUP))
    if tuple(x_scale.shape) not in (by_row, by_group) or x_scale.dtype != torch.float32:
        raise ValueError(
            f"scaled_linear: x_scale must be float32 {by_row} or {by_group}, got {x_scale.dtype} {tuple(x_scale.shape)}"
        )
    if tuple(weight_scale.shape) != (out_features,) or weight_scale.dtype != torch.float32:
        raise ValueError(
            f"scaled_linear: weight_scale must be float32 {(out_features,)}, got {weight_scale.dtype}"
            f" {tuple(weight_scale.shape)}"
        )
    if bias is not None and (tuple(bias.shape) != (out_features,) or not bias.is_floating_point()):
        raise ValueError(f"scaled_linear: bias must be {(out_features,)}, got {bias.dtype} {tuple(bias.shape)}")
