"""`reference.upsample_conv2d`: the four phases in one launch, 16 products where the 3x3 convolution has 36.

Each frame is convolved once, and the programs of its four phases follow each other: what the first reads is in L2 for
the others. Where time doubles the result is written twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op

from .._triton.frames import stride_of_samples
from .._triton.tuned import launch, launches
from .triton_taps import kind_of, most_channels, pixels_of, product_of_taps, tuned_kernels


@triton.jit(do_not_specialize=["time", "height", "width"])
def upsample_conv2d_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    time,
    height,
    width,
    stride_xb,
    stride_xt,
    stride_ob,
    stride_ot,
    stride_oh,
    stride_ow,
    CHANNELS: tl.constexpr,
    MOST_K: tl.constexpr,
    OUT: tl.constexpr,
    DOUBLES_TIME: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    OUT_TILES: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    outs = program % OUT_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    phase = program // OUT_TILES % 4
    p, q = phase // 2, phase % 2
    t = program // (OUT_TILES * 4) % time
    row, column, is_pixel = pixels_of(program // (OUT_TILES * 4) // time, width, height * width, BLOCK_M)
    x_ptr += sample * stride_xb
    output = product_of_taps(
        x_ptr,
        x_ptr,
        stride_xt,
        stride_xt,
        weight_ptr + phase * (OUT * 4 * CHANNELS),
        t,
        row - 1 + p,
        column - 1 + q,
        is_pixel,
        outs,
        height,
        width,
        CHANNELS,
        OUT,
        1,
        2,
        2,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K if BLOCK_K < MOST_K else MOST_K,
    )
    mask = is_pixel[:, None] & (outs[None, :] < OUT)
    if bias_ptr is not None:
        output += tl.load(bias_ptr + outs, mask=outs < OUT, other=0.0).to(tl.float32)[None, :]
    output = output.to(out_ptr.dtype.element_ty)
    # Of an odd number of frames the first is not doubled.
    is_odd = time % 2
    target = tl.maximum(2 * t - is_odd, 0) if DOUBLES_TIME else t
    row, column = (2 * row + p).to(tl.int64)[:, None], (2 * column + q).to(tl.int64)[:, None]
    out_ptr += sample * stride_ob + target.to(tl.int64) * stride_ot
    out = out_ptr + row * stride_oh + column * stride_ow + outs[None, :]
    tl.store(out, output, mask=mask)
    if DOUBLES_TIME:
        tl.store(out + stride_ot, output, mask=mask & ((t > 0) | (is_odd == 0)))


KERNELS = tuned_kernels(upsample_conv2d_kernel)


@launches(upsample_conv2d_kernel)
@triton_op("cogvx_kernels::upsample_conv2d_triton", mutates_args=())
def upsample_conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, doubles_time: bool
) -> torch.Tensor:
    """`ops.upsample_conv2d` of contiguous frames.

    Args:
        weight: of the phases, contiguous `(2, 2, out channels, 2, 2, channels)`.
    """
    batch, time, height, width, channels = x.shape
    out_channels = weight.shape[2]
    frames = 2 * time - time % 2 if doubles_time else time
    out = torch.empty((batch, frames, 2 * height, 2 * width, out_channels), dtype=x.dtype, device=x.device)

    def grid(meta):
        tiles = triton.cdiv(height * width, meta["BLOCK_M"])
        return tiles * time * 4 * triton.cdiv(out_channels, meta["BLOCK_N"]), batch

    launch(
        KERNELS[kind_of(x.dtype, channels, out_channels)],
        x.device,
        grid,
        *(x, weight, bias, out, time, height, width),
        *(stride_of_samples(x), x.stride(1)),
        *(stride_of_samples(out), *out.stride()[1:4]),
        size=time * height * width,
        CHANNELS=channels,
        MOST_K=most_channels(channels),
        OUT=out_channels,
        DOUBLES_TIME=doubles_time,
    )
    return out
