"""What the convolutions share: a matrix product whose left side is gathered from frames, tap by tap.

Frames are channels-last, so that a pixel's channels are one row of the left matrix; the taps of the kernel give one
such matrix each, at a shift that is the same for all rows of a tile. A tile lies within one frame, so that which frame
a tap reads, or whether it reads the past, is one decision for all its rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._triton.tuned import EVERYWHERE, Configs, TunedKernel


def _config(
    pixels: int, outs: int, channels: int, num_warps: int, num_stages: int, registers: int | None = None
) -> triton.Config:
    """`registers`: of a thread, where ptxas by itself would take fewer and spill."""
    tile = {"BLOCK_M": pixels, "BLOCK_N": outs, "BLOCK_K": channels}
    return triton.Config(tile, num_warps=num_warps, num_stages=num_stages, maxnreg=registers)


# mma.sync: a warp's 64x64 part of the output reads 8 KiB of shared memory for every 32 channels, half as long as the
# products take. 255 registers without a spill, two programs to a multiprocessor: one has its products while the other
# waits.
_AMPERE = [_config(128, 128, 64, 4, 3), _config(128, 128, 32, 4, 4), _config(256, 128, 32, 8, 4)]
# 99 KiB of shared memory a program, 100 for two: 32 channels.
_ADA = [_config(128, 128, 32, 4, 3), _config(256, 128, 32, 8, 3)]
# wgmma reads shared memory itself: 64x128 of the output in 64 cycles with 6 KiB, which take 48. 64 channels are the 128
# bytes of its widest swizzle. For 256 pixels L2 has to give 48 bytes a cycle, for 128 it would have to give 64, more
# than it has. 256 output channels spill.
_HOPPER = [_config(256, 128, 64, 8, 3), _config(128, 128, 64, 4, 3)]
# The accumulator is in tensor memory, but comes through registers for the epilogue: 4 warps would spill there. What 8
# warps issue for 64 channels takes longer than tcgen05 does; for 128 it takes as long.
_BLACKWELL = [_config(128, 128, 128, 8, 3), _config(128, 128, 64, 8, 4)]
# 64 KiB of shared memory, where one stage leaves room for two programs.
_CDNA = [_config(128, 128, 32, 4, 2), _config(128, 128, 64, 4, 1)]
# Pixels by 16 output channels, the fewest that there are products of: bound by what L2 gives, not by them.
_NARROW = [_config(128, 16, 64, 4, 3)]
# fp32 exactly, without tensor cores (see `product_of_taps`): 8x8 products for 16 numbers from shared memory.
_FLOAT32 = [_config(64, 64, 16, 4, 3), _config(128, 64, 16, 8, 3)]
CONFIGS: dict[str, Configs] = {
    "wide": {
        "a100": _AMPERE,
        "rtx": _ADA,
        "hopper": _HOPPER,
        "blackwell": _BLACKWELL,
        "rtx-blackwell": _ADA,
        "cdna": _CDNA,
    },
    "narrow": {EVERYWHERE: _NARROW},
    "float32": {
        "blackwell": [_config(64, 64, 16, 4, 3, 168), _config(128, 64, 16, 8, 3)],
        "rtx-blackwell": [_config(64, 64, 16, 4, 3), _config(128, 64, 16, 8, 2)],  # three stages spill there
        EVERYWHERE: _FLOAT32,
    },
}
NARROW = 16  # output channels of the narrow tiles


def tuned_kernels(fn: triton.JITFunction) -> dict[str, TunedKernel]:
    """A convolution with each of the tables of `CONFIGS`."""
    return {kind: TunedKernel(fn, configs, ("CHANNELS", "OUT")) for kind, configs in CONFIGS.items()}


def kind_of(dtype: torch.dtype, channels: int, out_channels: int) -> str:
    """Which table of `CONFIGS` a convolution uses."""
    if dtype == torch.float32:
        return "float32"
    # Fewer channels than a product has come one by one through registers, of which wide tiles leave none.
    return "narrow" if out_channels <= NARROW or channels < 16 else "wide"


def most_channels(channels: int) -> int:
    """The widest tile that `channels` can fill; 16 is what the matrix instructions multiply."""
    return max(16, triton.next_power_of_2(channels))


@triton.jit
def pixels_of(tile, width, count, BLOCK_M: tl.constexpr):
    """The pixels of a tile of one frame's `count`: `(row, column, whether it is there)`, each `(BLOCK_M,)`."""
    pixels = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    return pixels // width, pixels % width, pixels < count


@triton.jit
def _inside(row, column, is_pixel, height, width, KH: tl.constexpr, KW: tl.constexpr):
    """Which taps of each pixel lie within the frame, a bit each: one test a tap is left for the loop."""
    bits = tl.zeros_like(row)
    for i in tl.static_range(KH):
        for j in tl.static_range(KW):
            there = (row + i >= 0) & (row + i < height) & (column + j >= 0) & (column + j < width)
            bits |= (there & is_pixel).to(tl.int32) << (i * KW + j)
    return bits


@triton.jit
def product_of_taps(
    x_ptr,
    past_ptr,
    stride_xt,
    stride_pt,
    weight_ptr,
    time,
    row,
    column,
    is_pixel,
    outs,
    height,
    width,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The convolution at a tile of pixels of the frame `time`, fp32 `(BLOCK_M, BLOCK_N)`.

    x_ptr, past_ptr: a sample's frames and the `KT - 1` frames before them; within a frame both are contiguous.
    weight_ptr: `(OUT, KT, KH, KW, CHANNELS)`, contiguous.
    row, column: of each pixel's first tap, outside of the frame where there is padding.
    outs: the output channels, `(BLOCK_N,)`.

    fp32 is multiplied as fp32: three products of TF32 would be faster on tensor cores, but lose the bits by which the
    error is measured, and no checkpoint has an autoencoder in fp32 on a GPU.
    """
    inside = _inside(row, column, is_pixel, height, width, KH, KW)
    channels = tl.arange(0, BLOCK_K)
    pixels = ((row.to(tl.int64) * width + column) * CHANNELS)[:, None] + channels[None, :]
    weights = outs[None, :] * (KT * KH * KW * CHANNELS) + channels[:, None]
    is_out = outs[None, :] < OUT
    output = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    for step in range(KT * KH * KW * BLOCKS):
        first = step % BLOCKS * BLOCK_K
        tap = step // BLOCKS
        j = tap % KW
        i = tap // KW % KH
        k = tap // (KW * KH)
        source = time + k - (KT - 1)
        frame = tl.where(
            source < 0,
            past_ptr + (source + (KT - 1)).to(tl.int64) * stride_pt,
            x_ptr + source.to(tl.int64) * stride_xt,
        )
        in_frame = ((inside >> (i * KW + j)) & 1)[:, None] != 0
        if CHANNELS % BLOCK_K != 0:
            in_frame = in_frame & (channels[None, :] < CHANNELS - first)
        x = tl.load(frame + ((i * width + j) * CHANNELS + first) + pixels, mask=in_frame, other=0.0)
        part = weight_ptr + (tap * CHANNELS + first)
        if CHANNELS % BLOCK_K != 0:
            weight = tl.load(part + weights, mask=is_out & (channels[:, None] < CHANNELS - first), other=0.0)
        elif OUT % BLOCK_N != 0:
            weight = tl.load(part + weights, mask=is_out, other=0.0)
        else:
            weight = tl.load(part + weights)
        output = tl.dot(x, weight, output, input_precision="ieee")
    return output
