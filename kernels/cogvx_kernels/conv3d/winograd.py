"""The convolution of `winograd.cpp`: t x 3 x 3 on channels-last frames in fp32 or bf16, with fewer products."""

from __future__ import annotations

import ctypes

import torch

from .._cpp.arguments import array, operand, optional, sizes, threads
from .._cpp.build import ORDERED, Source

# Neighbouring pixels on each side of a tile, by the dtype of the frames: the larger, the fewer the products and the
# larger the error, see `winograd.cpp`.
TILES = {torch.float32: 2, torch.bfloat16: 4}
# What makes up for the transforms: output pixels, for that of the weights, and inputs x outputs (of 16 in a vector),
# for those of the tiles. Measured against the direct convolutions, ours in fp32 and oneDNN's in bf16.
LEAST_PIXELS = {torch.float32: 0, torch.bfloat16: 5000}
LEAST_CHANNEL_PAIRS = {torch.float32: 128, torch.bfloat16: 512}
_SOURCE = Source.beside(__file__, "winograd.cpp", ORDERED)
why_unavailable = _SOURCE.why_unavailable


def _library() -> ctypes.CDLL:
    library = _SOURCE.library()
    library.packed_size.restype = ctypes.c_int64
    return library


def _kind(dtype: torch.dtype) -> ctypes.c_int:
    return ctypes.c_int(dtype == torch.bfloat16)


def takes(kernel: tuple[int, ...]) -> bool:
    """Whether a kernel `(time, height, width)` is one that it convolves with, at stride 1."""
    return tuple(kernel[1:]) == (3, 3)


def pays(kernel: tuple[int, ...], inputs: int, outputs: int, pixels: int, dtype: torch.dtype) -> bool:
    """Whether it is faster than a direct convolution of frames of `dtype` to `pixels`, of all frames and samples."""
    wide = inputs * max(outputs, 16) >= LEAST_CHANNEL_PAIRS[dtype]
    return takes(kernel) and wide and pixels >= LEAST_PIXELS[dtype]


def packed_size(outputs: int, inputs: int, taps: int, dtype: torch.dtype) -> int:
    """How many fp32 numbers the packed weight of frames of `dtype` has; `taps` of time."""
    return _library().packed_size(*sizes(outputs, inputs, taps), ctypes.c_int(TILES[dtype]))


def pack(weight: torch.Tensor) -> torch.Tensor:
    """The products' weights, fp32, of `weight` `(out, in, taps, 3, 3)`, in the order that `convolution` reads."""
    outputs, inputs, taps = weight.shape[:3]
    weight = weight.detach().contiguous()
    source = operand("weight", weight, tuple(TILES), (outputs, inputs, taps, 3, 3))
    packed = torch.empty(packed_size(outputs, inputs, taps, weight.dtype), dtype=torch.float32, device="cpu")
    _library().pack_weight(
        source,
        _kind(weight.dtype),
        *sizes(outputs, inputs, taps),
        ctypes.c_int(TILES[weight.dtype]),
        operand("packed", packed, torch.float32, packed.shape),
        threads(),
    )
    return packed


def convolution(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, taps: int, out: torch.Tensor, adds: bool = False
) -> None:
    """Writes the valid part of the convolution of `x` into `out`; sums are in fp32 and rounded once.

    Args:
        x: fp32 or bf16 `(batch, time + taps - 1, height + 2, width + 2, in)`, padded by the caller; any strides with
            contiguous channels.
        packed: the weight, by `pack` from the dtype of `x`.
        bias: fp32 `(out,)` or None.
        taps: of time.
        out: `(batch, time, height, width, out)` of the dtype of `x`, any strides with contiguous channels.
        adds: to what is in `out`, instead of overwriting it.
    """
    batch, time, height, width = x.shape[:4]
    expected = (batch, time - taps + 1, height - 2, width - 2)
    if tuple(out.shape[:4]) != expected or x.stride(4) != 1 or out.stride(4) != 1 or out.dtype != x.dtype:
        raise ValueError(
            f"out must be {expected} and channels of {x.dtype}, contiguous as in x, got {tuple(out.shape)} of"
            f" {out.dtype}, strides {out.stride()} and {x.stride()}"
        )
    source = operand("x", x, tuple(TILES), x.shape, strided=4)
    inputs, outputs = x.shape[4], out.shape[4]
    _library().convolution(
        source,
        _kind(x.dtype),
        array(x.stride()[:4]),
        operand("packed", packed, torch.float32, (packed_size(outputs, inputs, taps, x.dtype),)),
        optional("bias", bias, torch.float32, (outputs,)),
        *sizes(taps),
        ctypes.c_int(TILES[x.dtype]),
        *sizes(*out.shape[:4], inputs, outputs),
        operand("out", out, x.dtype, out.shape, strided=4),
        array(out.stride()[:4]),
        ctypes.c_int(adds),
        threads(),
    )
