"""The autoencoder's convolutions of channels-last frames.

On a GPU they are `causal_conv3d` and `upsample_conv2d`, which need no padding. On a CPU they are of frames that the
caller has padded, with weights that are reordered once: `pack_conv3d` and `packed_conv3d`.
"""

from __future__ import annotations

import math

import torch

from .._triton import kernels_of
from ..checks import check_frames, check_impl, check_triton
from . import direct, reference, winograd
from .reference import phase_weights
from .winograd import pays as winograd_pays

__all__ = [
    "causal_conv3d",
    "pack_conv3d",
    "packed_conv3d",
    "packed_conv3d_size",
    "phase_weights",
    "upsample_conv2d",
    "winograd_pays",
]

gpu, upsample = kernels_of(__name__), kernels_of(__name__, "triton_upsample")


def causal_conv3d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    past: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    rows: tuple[int, int] | None = None,
    impl: str = "torch",
) -> torch.Tensor:
    """A convolution of stride 1, causal in time, with zeros around each frame: `conv([past, x]) + bias + residual`.

    Args:
        x: `(batch, time, height, width, channels)`.
        weight: `(out channels, channels, kernel, size, size)` as torch has it, size odd. "triton" reads it as
            `(out channels, kernel, size, size, channels)`: that costs a copy unless it is in
            `torch.channels_last_3d`.
        bias: `(out channels,)` or None.
        past: the `kernel - 1` frames before `x`, in its shape; None: the first frame stands for them.
        residual: of the output's shape, or None.
        out: where the output is written, with contiguous channels; may be `residual`, but not `x` or `past`. None: a
            new contiguous tensor.
        rows: which rows of the output are made, first and after the last; None: all. The others of `x` are still its
            neighbours: a layer computed in slices of rows is the same layer.
        impl: "torch", or "triton": fp16, bf16 or fp32, of one dtype, and sizes 1 and 3, on a GPU. Products are summed
            in fp32 and rounded once. Frames of `x` and `past` that are not contiguous are copied.

    Returns:
        `out`, `(batch, time, rows, width, out channels)`.

    Raises:
        ValueError: for shapes or dtypes that do not fit or an unknown `impl`.
    """
    operation = "causal_conv3d"
    check_impl(operation, impl)
    check_frames(operation, x=x)
    batch, time, height, width, channels = x.shape
    if weight.ndim != 5 or weight.shape[1] != channels or weight.shape[3] != weight.shape[4] or not weight.shape[3] % 2:
        raise ValueError(
            f"{operation}: weight must be (out channels, {channels}, kernel, size, size) with an odd size, got"
            f" {tuple(weight.shape)}"
        )
    first, last = rows or (0, height)
    if not 0 <= first < last <= height:
        raise ValueError(f"{operation}: rows={rows} must be first and after the last of the {height} rows of x")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{operation}: bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    expected = (batch, weight.shape[2] - 1, height, width, channels)
    if past is not None and tuple(past.shape) != expected:
        raise ValueError(f"{operation}: past must be {expected}, got {tuple(past.shape)}")
    expected = (batch, time, last - first, width, weight.shape[0])
    for name, tensor in (("residual", residual), ("out", out)):
        if tensor is not None and (tuple(tensor.shape) != expected or tensor.dtype != x.dtype):
            raise ValueError(
                f"{operation}: {name} must be {expected} {x.dtype}, got {tuple(tensor.shape)} {tensor.dtype}"
            )
    if impl == "torch":
        result = reference.causal_conv3d(x, weight, bias, past, residual, (first, last))
        return result.contiguous() if out is None else out.copy_(result)
    weight = _contiguous(weight.permute(0, 2, 3, 4, 1))
    past = None if past is None or not past.shape[1] else _whole(past)
    out = torch.empty(expected, dtype=x.dtype, device=x.device) if out is None else out
    _check_triton(operation, x, weight, bias, past, residual, out)
    gpu.causal_conv3d(_whole(x), weight, bias, past, residual, out, first)
    return out


def upsample_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    doubles_time: bool = False,
    impl: str = "torch",
) -> torch.Tensor:
    """Each frame doubled by nearest interpolation, and a 3x3 convolution with zeros around the result.

    Args:
        x: `(batch, time, height, width, channels)`.
        weight: `(out channels, channels, 3, 3)`.
        bias: `(out channels,)` or None.
        doubles_time: whether each frame appears twice, the first of an odd number once.
        impl: "torch", or "triton" as in `causal_conv3d`. Both compute the four phases of the output from sums of the
            weights, which are rounded to their dtype once.

    Returns:
        New contiguous frames `(batch, frames, 2 * height, 2 * width, out channels)`.

    Raises:
        ValueError: for shapes or dtypes that do not fit or an unknown `impl`.
    """
    operation = "upsample_conv2d"
    check_impl(operation, impl)
    check_frames(operation, x=x)
    if weight.ndim != 4 or tuple(weight.shape[1:]) != (x.shape[4], 3, 3):
        raise ValueError(f"{operation}: weight must be (out channels, {x.shape[4]}, 3, 3), got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{operation}: bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    if impl == "torch":
        return reference.upsample_conv2d(x, weight, bias, doubles_time)
    weight = _contiguous(reference.phase_weights(weight).permute(0, 1, 2, 4, 5, 3))
    _check_triton(operation, x, weight, bias)
    return upsample.upsample_conv2d(_contiguous(x), weight, bias, doubles_time)


def pack_conv3d(weight: torch.Tensor, impl: str) -> torch.Tensor:
    """A copy of `weight` `(out channels, channels, *kernel)` in the order that `packed_conv3d` reads.

    Args:
        impl: "direct": of fp32; or "winograd": of fp32 or bf16, a kernel of any number of frames and 3 x 3.
    """
    check_impl("packed_conv3d", impl)
    return winograd.pack(weight) if impl == "winograd" else direct.pack(weight)


def packed_conv3d(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    kernel: tuple[int, int, int],
    out: torch.Tensor,
    adds: bool = False,
    stride: int = 1,
    impl: str = "direct",
) -> None:
    """Writes the valid part of the convolution of `x`, which the caller has padded, into `out`; sums are in fp32.

    Args:
        x: `(batch, time + kt - 1, stride * (height - 1) + kh, stride * (width - 1) + kw, channels)`, contiguous
            channels; up to `stride - 1` rows and columns more are not read.
        packed: the weight, by `pack_conv3d` for the same `impl`.
        bias: fp32 `(out channels,)` or None.
        kernel: `(kt, kh, kw)`.
        out: `(batch, time, height, width, out channels)` of the dtype of `x`, any strides with contiguous channels.
        adds: to what is in `out`, instead of overwriting it.
        stride: of height and width; 1 for "winograd".
        impl: "direct": fp32; "winograd": fp32 or bf16 with fewer products, rounded once, after `adds`.

    Raises:
        ValueError: for shapes, strides or dtypes that do not fit, or an unknown `impl`.
    """
    check_impl("packed_conv3d", impl)
    if impl == "direct":
        return direct.convolution(x, packed, bias, kernel, out, adds, stride)
    if not winograd.takes(kernel) or stride != 1:
        raise ValueError(f'packed_conv3d: impl="winograd" takes kernels of 3 x 3 and stride 1, got {kernel}, {stride}')
    return winograd.convolution(x, packed, bias, kernel[0], out, adds)


def packed_conv3d_size(
    out_channels: int, channels: int, kernel: tuple[int, ...], impl: str, dtype: torch.dtype = torch.float32
) -> int:
    """How many fp32 numbers `pack_conv3d` makes, for frames of `dtype`."""
    check_impl("packed_conv3d", impl)
    if impl == "winograd":
        return winograd.packed_size(out_channels, channels, kernel[0], dtype)
    return direct.packed_size(out_channels, channels, math.prod(kernel))


def _whole(frames: torch.Tensor) -> torch.Tensor:
    """Frames as the kernels read them: each contiguous, wherever the next one is."""
    _, _, _, width, channels = frames.shape
    return frames if frames.stride()[2:] == (width * channels, channels, 1) else _contiguous(frames)


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    # contiguous() cannot be traced with fake CUDA tensors on a torch without CUDA, this can.
    return tensor if tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


def _check_triton(operation: str, x: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor | None) -> None:
    check_triton(operation, x, weight, *others)
    dtypes = {tensor.dtype for tensor in (x, weight, *others) if tensor is not None}
    if len(dtypes) > 1 or weight.shape[-2] > 3:
        raise ValueError(
            f'{operation}: impl="triton" takes tensors of one dtype and kernels of 1x1 or 3x3, got'
            f" {', '.join(sorted(map(str, dtypes)))} and {weight.shape[-3]}x{weight.shape[-2]}"
        )
