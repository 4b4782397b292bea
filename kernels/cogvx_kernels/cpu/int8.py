"""Linear layers whose activations and weights are rounded to int8, on a CPU.

    q = round(x / s), s = max|x| / 127 for each row
    y = (q @ weight^T) * s * channel scale + bias

The product is torch's (oneDNN), which takes AMX tiles or AVX512-VNNI where the CPU has them; its int32 sums are exact.
What is before and after it is `int8.cpp`: one pass each, rows never leave int8 between the two products of a
feed-forward.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch

from .arguments import operand, sizes, threads
from .build import REORDERED, Source

Argument = ctypes.c_void_p | ctypes.c_int64
DTYPES = (torch.bfloat16, torch.float32)
MAX_DIM = 2**17  # sums of 127 * 127 stay below 2^31
_SOURCE = Source("int8.cpp", REORDERED)


@functools.cache
def why_unavailable() -> str | None:
    """What keeps this machine from gaining by int8 products, or None. Compiles them, a second, the first time."""
    if not (torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()):
        return "it needs a CPU with AVX512-VNNI or AMX"
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    return _SOURCE.why_unavailable()


@dataclass(frozen=True)
class QuantizedRows:
    """Activations `(rows, dim)` in int8 and their scales, fp32 `(rows,)`."""

    values: torch.Tensor
    scales: torch.Tensor


def quantize_rows(x: torch.Tensor) -> QuantizedRows:
    """Each row of `x` `(rows, dim)`, bf16 or fp32, rounded to 255 steps of its largest magnitude.

    A row with NaN or an infinity gets the scale NaN.
    """
    count, dim = x.shape
    x = x.contiguous()
    source = operand("x", x, DTYPES, (count, dim))
    rows = _empty_rows(count, dim)
    _SOURCE.function("quantize_rows", x.dtype)(source, *sizes(count, dim), *_outputs(rows), threads())
    return rows


def multiply(x: QuantizedRows, weight: torch.Tensor, buffer: torch.Tensor | None = None) -> torch.Tensor:
    """The int32 sums `(rows, out)` of `x @ weight^T` for int8 `weight` `(out, in)`, in the memory of `buffer` if it
    is large enough: int32 of one axis."""
    size = (len(x.values), len(weight))
    if buffer is None or buffer.numel() < size[0] * size[1]:
        return torch._int_mm(x.values, weight.t())
    return torch._int_mm(x.values, weight.t(), out=buffer[: size[0] * size[1]].view(size))


def dequantize(
    sums: torch.Tensor, row_scales: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor, output: torch.Tensor
) -> None:
    """`output = sums * row_scales * scales + bias`.

    Args:
        sums: int32 `(rows, out)`, contiguous.
        row_scales: fp32 `(rows,)`.
        scales, bias: fp32 `(out,)`.
        output: bf16 or fp32 `(rows, out)` of any row stride with a contiguous last axis.
    """
    into = operand("output", output, DTYPES, sums.shape, strided=1)
    _SOURCE.function("dequantize", output.dtype)(
        *_sums(sums, row_scales, scales, bias), into, *sizes(output.stride(0)), threads()
    )


def gelu_quantize_rows(
    sums: torch.Tensor, row_scales: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor
) -> QuantizedRows:
    """`quantize_rows` of the tanh form of GELU of what `dequantize` would give, without its rounding."""
    given = _sums(sums, row_scales, scales, bias)
    rows = _empty_rows(*sums.shape)
    _SOURCE.library().gelu_quantize_rows(*given, *_outputs(rows), threads())
    return rows


def _sums(sums: torch.Tensor, row_scales: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor) -> list[Argument]:
    """A product, its size, and what makes numbers of it."""
    rows, out = sums.shape
    return [
        operand("sums", sums, torch.int32, (rows, out)),
        *sizes(rows, out),
        operand("row_scales", row_scales, torch.float32, (rows,)),
        operand("scales", scales, torch.float32, (out,)),
        operand("bias", bias, torch.float32, (out,)),
    ]


def _outputs(rows: QuantizedRows) -> list[Argument]:
    return [
        operand("values", rows.values, torch.int8, rows.values.shape),
        operand("scales", rows.scales, torch.float32, rows.scales.shape),
    ]


def _empty_rows(rows: int, dim: int) -> QuantizedRows:
    return QuantizedRows(
        torch.empty(rows, dim, dtype=torch.int8, device="cpu"), torch.empty(rows, dtype=torch.float32, device="cpu")
    )
