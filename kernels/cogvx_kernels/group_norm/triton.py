"""`reference.group_norm_modulate_silu`: one read and one write of the frames; the tables are small and come from L2."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op

from .._triton.frames import stride_of_samples
from .._triton.tuned import EVERYWHERE, launch, launches, tuned

# Bound by memory everywhere. A tile is part of one row of pixels. 32 numbers a thread are four loads of 16 bytes under
# way (half precision) beside those of the tables, which 8 neighbouring pixels of the last level share; 16 are two.
_TILES = [triton.Config({"TILE": tile}, num_warps=warps, num_stages=1) for tile, warps in ((4096, 4), (2048, 4))]
CONFIGS = {EVERYWHERE: _TILES}


@tuned(CONFIGS, key=("CHANNELS",))
@triton.jit(do_not_specialize=["height", "width", "table_time", "table_height", "table_width"])
def group_norm_modulate_silu_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    frames_ptr,
    rows_ptr,
    columns_ptr,
    out_ptr,
    height,
    width,
    table_time,
    table_height,
    table_width,
    stride_xb,
    stride_xt,
    stride_xh,
    stride_xw,
    stride_ob,
    stride_ot,
    stride_oh,
    stride_ow,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    PIXELS: tl.constexpr = TILE // BLOCK if TILE > BLOCK else 1
    tiles = tl.cdiv(width, PIXELS)
    line = tl.program_id(0) // tiles
    # Frames of a whole clip have more than 2^31 elements.
    sample, t, h = tl.program_id(1).to(tl.int64), (line // height).to(tl.int64), (line % height).to(tl.int64)
    w = (tl.program_id(0) % tiles * PIXELS + tl.arange(0, PIXELS)).to(tl.int64)[:, None]
    channels = tl.arange(0, BLOCK)[None, :]
    mask = (w < width) & (channels < CHANNELS)
    column = tl.load(columns_ptr + w, mask=w < width, other=0)
    table = (sample * table_time + tl.load(frames_ptr + t)) * table_height + tl.load(rows_ptr + h)
    table = (table * table_width + column) * CHANNELS + channels
    x_ptr += sample * stride_xb + t * stride_xt + h * stride_xh
    x = tl.load(x_ptr + w * stride_xw + channels, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + table, mask=mask, other=0.0)
    y = x * scale + tl.load(shift_ptr + table, mask=mask, other=0.0)
    out = y / (1 + tl.exp(-y))
    out_ptr += sample * stride_ob + t * stride_ot + h * stride_oh
    tl.store(out_ptr + w * stride_ow + channels, out.to(out_ptr.dtype.element_ty), mask=mask)


@launches(group_norm_modulate_silu_kernel)
@triton_op("cogvx_kernels::group_norm_modulate_silu_triton", mutates_args=("out",))
def group_norm_modulate_silu(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    frames: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """`ops.group_norm_modulate_silu` for frames whose channels are contiguous, contiguous tables and indices."""
    batch, time, height, width, channels = x.shape
    block = triton.next_power_of_2(channels)

    def grid(meta):
        return time * height * triton.cdiv(width, max(meta["TILE"] // block, 1)), batch

    launch(
        group_norm_modulate_silu_kernel,
        x.device,
        grid,
        *(x, scale, shift, frames, rows, columns, out),
        *(height, width, *scale.shape[1:4]),
        *(stride_of_samples(x), *x.stride()[1:4]),
        *(stride_of_samples(out), *out.stride()[1:4]),
        size=time * height * width,
        CHANNELS=channels,
        BLOCK=block,
    )
