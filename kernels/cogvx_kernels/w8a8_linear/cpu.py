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

import torch

from .._cpp.arguments import operand, sizes, threads
from .._cpp.build import REORDERED, Source
from ..checks import CPU_DTYPES

Argument = ctypes.c_void_p | ctypes.c_int64
MAX_INT8_DIM = 2**17  # sums of 127 * 127 stay below 2^31
_SOURCE = Source.beside(__file__, "int8.cpp", REORDERED)


@functools.cache
def why_unavailable() -> str | None:
    """What keeps this machine from gaining by int8 products, or None. Compiles them, a second, the first time."""
    if not (torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()):
        return "it needs a CPU with AVX512-VNNI or AMX"
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    return _SOURCE.why_unavailable()


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.quantize_rows`."""
    dim = x.shape[-1]
    rows = x.contiguous().view(-1, dim)
    source = operand("x", rows, CPU_DTYPES, rows.shape)
    numbers, scales = _empty_rows(len(rows), dim)
    _SOURCE.function("quantize_rows", x.dtype)(source, *sizes(*rows.shape), *_outputs(numbers, scales), threads())
    return numbers.view(x.shape), scales.view(x.shape[:-1])


def int8_products(numbers: torch.Tensor, weight: torch.Tensor, buffer: torch.Tensor | None = None) -> torch.Tensor:
    """The int32 sums `(rows, out)` of `numbers @ weight^T` for int8 `(rows, in)` and `(out, in)`, in the memory of
    `buffer` if it is large enough: int32 of one axis."""
    size = (len(numbers), len(weight))
    if buffer is None or buffer.numel() < size[0] * size[1]:
        return torch._int_mm(numbers, weight.t())
    return torch._int_mm(numbers, weight.t(), out=buffer[: size[0] * size[1]].view(size))


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
    into = operand("output", output, CPU_DTYPES, sums.shape, strided=1)
    _SOURCE.function("dequantize", output.dtype)(
        *_sums(sums, row_scales, scales, bias), into, *sizes(output.stride(0)), threads()
    )


def gelu_quantize_rows(
    sums: torch.Tensor, row_scales: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows` of the tanh form of GELU of what `dequantize` would give, without its rounding."""
    given = _sums(sums, row_scales, scales, bias)
    rows = _empty_rows(*sums.shape)
    _SOURCE.library().gelu_quantize_rows(*given, *_outputs(*rows), threads())
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


def _outputs(numbers: torch.Tensor, scales: torch.Tensor) -> list[Argument]:
    return [
        operand("numbers", numbers, torch.int8, numbers.shape),
        operand("scales", scales, torch.float32, scales.shape),
    ]


def _empty_rows(rows: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.empty((rows, dim), dtype=torch.int8, device="cpu")
    return numbers, torch.empty(rows, dtype=torch.float32, device="cpu")
