"""`reference.causal_conv3d` as an implicit matrix product: neither padded frames nor a copy of the past are made.

Rows and columns outside of the frame are masked, frames before the first are read where they are: in the past's own
tensor, or, where there is none, in the first frame itself, as a past whose frames are zero elements apart.

Programs that run at the same time have the same pixels of all frames: the `time + 2` frames' worth of a few rows stay
in L2, so that each frame comes from memory once and not three times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op

from .._triton.frames import stride_of_samples
from .._triton.tuned import Grid, is_real, launch, launches
from .triton_taps import kind_of, most_channels, pixels_of, product_of_taps, tuned_kernels


@triton.jit(do_not_specialize=["time", "height", "width", "first_row", "pixels"])
def causal_conv3d_kernel(
    x_ptr,
    past_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    time,
    height,
    width,
    first_row,
    pixels,
    stride_xb,
    stride_xt,
    stride_pb,
    stride_pt,
    stride_rb,
    stride_rt,
    stride_rh,
    stride_rw,
    stride_ob,
    stride_ot,
    stride_oh,
    stride_ow,
    CHANNELS: tl.constexpr,
    MOST_K: tl.constexpr,
    OUT: tl.constexpr,
    KT: tl.constexpr,
    KS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    OUT_TILES: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    outs = program % OUT_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    t = program // OUT_TILES % time
    row, column, is_pixel = pixels_of(program // OUT_TILES // time, width, pixels, BLOCK_M)
    output = product_of_taps(
        x_ptr + sample * stride_xb,
        past_ptr + sample * stride_pb,
        stride_xt,
        stride_pt,
        weight_ptr,
        t,
        row + (first_row - KS // 2),
        column - KS // 2,
        is_pixel,
        outs,
        height,
        width,
        CHANNELS,
        OUT,
        KT,
        KS,
        KS,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K if BLOCK_K < MOST_K else MOST_K,
    )
    mask = is_pixel[:, None] & (outs[None, :] < OUT)
    # A clip has more than 2^31 elements.
    row, column, t = row.to(tl.int64)[:, None], column.to(tl.int64)[:, None], t.to(tl.int64)
    if bias_ptr is not None:
        output += tl.load(bias_ptr + outs, mask=outs < OUT, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        residual_ptr += sample * stride_rb + t * stride_rt
        residual = residual_ptr + row * stride_rh + column * stride_rw + outs[None, :]
        output += tl.load(residual, mask=mask, other=0.0).to(tl.float32)
    out_ptr += sample * stride_ob + t * stride_ot
    out = out_ptr + row * stride_oh + column * stride_ow + outs[None, :]
    tl.store(out, output.to(out_ptr.dtype.element_ty), mask=mask)


KERNELS = tuned_kernels(causal_conv3d_kernel)
TRIAL_BYTES = 32 << 20  # of output that is timed with, where the output itself cannot be written twice


@launches(causal_conv3d_kernel)
@triton_op("cogvx_kernels::causal_conv3d_triton", mutates_args=("out",))
def causal_conv3d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    past: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    first_row: int,
) -> None:
    """`ops.causal_conv3d` of `out`'s rows, which begin at `first_row` of `x`.

    Args:
        x, past: whose frames are contiguous.
        weight: contiguous `(out channels, kernel, kernel size, kernel size, channels)`.
        residual, out: whose channels are contiguous; may be the same.
    """
    past, past_strides = (x, (stride_of_samples(x), 0)) if past is None else (past, _strides(past))
    in_place = is_real(x.device) and residual is not None and residual.data_ptr() == out.data_ptr()

    def call(out: torch.Tensor) -> tuple[Grid, tuple]:
        batch, time, rows, width, out_channels = out.shape

        def grid(meta):
            tiles = triton.cdiv(rows * width, meta["BLOCK_M"])
            return tiles * time * triton.cdiv(out_channels, meta["BLOCK_N"]), batch

        return grid, (
            *(x, past, weight, bias, residual, out),
            *(time, x.shape[2], width, first_row, rows * width),
            *_strides(x),
            *past_strides,
            *_strides(out if residual is None else residual, 4),
            *_strides(out, 4),
        )

    grid, arguments = call(out)
    launch(
        KERNELS[kind_of(x.dtype, x.shape[4], out.shape[4])],
        x.device,
        grid,
        *arguments,
        size=out.shape[1:4].numel(),
        trial=(lambda: call(_beside(out))) if in_place else None,
        CHANNELS=x.shape[4],
        MOST_K=most_channels(x.shape[4]),
        OUT=out.shape[4],
        KT=weight.shape[1],
        KS=weight.shape[2],
    )


def _strides(frames: torch.Tensor, number: int = 2) -> tuple[int, ...]:
    return stride_of_samples(frames), *frames.stride()[1:number]


def _beside(out: torch.Tensor) -> torch.Tensor:
    """Memory for the first rows of the first frame of `out`."""
    _, _, rows, width, channels = out.shape
    rows = max(min(rows, TRIAL_BYTES // (width * channels * out.element_size())), 1)
    return torch.empty((1, 1, rows, width, channels), dtype=out.dtype, device=out.device)
