"""The convolution of `direct.cpp`: channels-last frames in fp32, with sums that round little."""

from __future__ import annotations

import ctypes
import functools

import torch

from .._cpp.arguments import array, operand, optional, sizes, threads
from .._cpp.build import ORDERED, Source

_SOURCE = Source.beside(__file__, "direct.cpp", ORDERED)
why_unavailable = _SOURCE.why_unavailable


def _library() -> ctypes.CDLL:
    library = _SOURCE.library()
    library.packed_size.restype = ctypes.c_int64
    return library


def packed_size(outputs: int, inputs: int, taps: int) -> int:
    """How many numbers a packed weight has: more than the weight, where outputs do not fill a vector."""
    return _library().packed_size(*sizes(outputs, inputs, taps))


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A reordered copy of fp32 `weight` `(out, in, *kernel)`, which `convolution` reads."""
    outputs, inputs, *kernel = weight.shape
    taps = functools.reduce(int.__mul__, kernel, 1)
    packed = torch.empty(packed_size(outputs, inputs, taps), dtype=torch.float32, device="cpu")
    weight = weight.detach().contiguous()
    _library().pack_weight(
        operand("weight", weight, torch.float32, weight.shape),
        *sizes(outputs, inputs, taps),
        operand("packed", packed, torch.float32, packed.shape),
        threads(),
    )
    return packed


def convolution(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    kernel: tuple[int, int, int],
    out: torch.Tensor,
    adds: bool = False,
    stride: int = 1,
) -> None:
    """Writes the valid part of the convolution of `x` into `out`.

    Args:
        x: fp32 `(batch, time + kt - 1, stride * (height - 1) + kh, stride * (width - 1) + kw, in)`, padded by the
            caller; up to `stride - 1` rows and columns more are not read. Any strides in memory, contiguous channels.
        packed: the weight, by `pack`.
        bias: `(out,)` or None.
        kernel: `(kt, kh, kw)`.
        out: fp32 `(batch, time, height, width, out)`, any strides with contiguous channels.
        adds: to what is in `out`, instead of overwriting it.
        stride: of height and width.
    """
    strides = (1, stride, stride)
    axes = zip(x.shape[1:4], kernel, strides, strict=True)
    expected = (x.shape[0], *((size - k) // step + 1 for size, k, step in axes))
    if tuple(out.shape[:4]) != expected or x.stride(4) != 1 or out.stride(4) != 1:
        raise ValueError(
            f"out must be {expected} and channels, with contiguous channels as in x, got {tuple(out.shape)},"
            f" strides {out.stride()} and {x.stride()}"
        )
    inputs, outputs = x.shape[4], out.shape[4]
    packed_shape = (packed_size(outputs, inputs, functools.reduce(int.__mul__, kernel, 1)),)
    _library().convolution(
        operand("x", x, torch.float32, x.shape, strided=4),
        array(x.stride()[:4]),
        operand("packed", packed, torch.float32, packed_shape),
        optional("bias", bias, torch.float32, (outputs,)),
        array(kernel),
        *sizes(stride, *out.shape[:4], inputs, outputs),
        operand("out", out, torch.float32, out.shape, strided=4),
        array(out.stride()[:4]),
        ctypes.c_int(adds),
        threads(),
    )
