"""`reference.group_norm_statistics`: one read of the frames, and no number that depends on the order programs run in.

First each program has the mean and the sum of squared differences to it of its own span of pixels, then one program a
group joins those of all spans. Within a program each place of the tile has a running mean of its own (Welford 1962),
and all merging is that of Chan, Golub and LeVeque 1979: nothing is squared before a mean is taken off, so that a mean
of many deviations costs no accuracy. Spans depend on the size alone, not on the GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op

from .._triton.frames import stride_of_samples
from .._triton.tuned import EVERYWHERE, launch, launches, tuned


# 16 numbers a thread: two loads of 16 bytes (half precision), and for each number two registers of running values. At
# 64 registers 32 warps fit a multiprocessor: their loads under way, 32 KiB, are what keeps the memory busy. On sm_86
# and sm_89 ptxas would make room for 36 warps, and spill in fp32 at the 56 registers that this leaves.
def _spans(registers: int | None = None) -> list[triton.Config]:
    few = triton.Config({"TILE": 2048}, num_warps=4, num_stages=1, maxnreg=registers)
    return [few, triton.Config({"TILE": 4096}, num_warps=8, num_stages=1)]


SPAN_CONFIGS = {"rtx": _spans(64), EVERYWHERE: _spans()}
JOIN_CONFIGS = {EVERYWHERE: [triton.Config({}, num_warps=8, num_stages=1)]}  # 1 MiB at the most, 16 spans a thread
MOST_SPANS = 4096  # enough for many waves of programs on the largest GPU, few enough to be joined in one tile
SMALLEST_SPAN = 64


@triton.jit
def _update(x, mean, squares, share):
    delta = x - mean
    mean += delta * share
    return mean, squares + delta * (x - mean)


@triton.jit
def _place_of(pixel, width, stride_h, CHANNELS: tl.constexpr, HAS_GAPS: tl.constexpr):
    """Where a pixel is among its sample's; a row of pixels may have a gap behind it."""
    if HAS_GAPS:
        return pixel // width * stride_h + pixel % width * CHANNELS
    return pixel * CHANNELS


@tuned(SPAN_CONFIGS, key=("CHANNELS",))
@triton.jit(do_not_specialize=["pixels", "span", "spans", "width"])
def group_norm_spans_kernel(
    x_ptr,
    means_ptr,
    squares_ptr,
    pixels,
    span,
    spans,
    width,
    stride_b,
    stride_h,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_EACH: tl.constexpr,
    HAS_GAPS: tl.constexpr,
    TILE: tl.constexpr,
):
    EACH: tl.constexpr = CHANNELS // GROUPS
    BLOCK: tl.constexpr = BLOCK_GROUPS * BLOCK_EACH
    ROWS: tl.constexpr = TILE // BLOCK if TILE > BLOCK else 1
    sample = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * span
    count = tl.minimum(span, pixels - first)
    places = tl.arange(0, BLOCK)[None, :]
    group, place = places // BLOCK_EACH, places % BLOCK_EACH
    # Where the groups' channels fill their blocks it is said so that the compiler sees one contiguous row.
    channels = places if EACH == BLOCK_EACH else group * EACH + place
    is_channel = places < CHANNELS if EACH == BLOCK_EACH else (group < GROUPS) & (place < EACH)
    rows = tl.arange(0, ROWS)[:, None]
    x_ptr += sample * stride_b
    pixel = first + rows.to(tl.int64)
    mean = tl.zeros((ROWS, BLOCK), tl.float32)
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(0, count // ROWS):
        offsets = _place_of(pixel + step * ROWS, width, stride_h, CHANNELS, HAS_GAPS)
        x = tl.load(x_ptr + offsets + channels, mask=is_channel, other=0.0).to(tl.float32)
        mean, squares = _update(x, mean, squares, 1 / (step + 1.0))
    number = count // ROWS + (rows < count % ROWS).to(tl.int32)
    if count % ROWS > 0:
        in_rows = rows < count % ROWS
        offsets = _place_of(pixel + count // ROWS * ROWS, width, stride_h, CHANNELS, HAS_GAPS)
        x = tl.load(x_ptr + offsets + channels, mask=is_channel & in_rows, other=0.0).to(tl.float32)
        new_mean, new_squares = _update(x, mean, squares, 1 / (count // ROWS + 1.0))
        mean, squares = tl.where(in_rows, new_mean, mean), tl.where(in_rows, new_squares, squares)
    number = number.to(tl.float32)
    total = count.to(tl.float32) * EACH
    sums = tl.reshape(tl.sum(mean * number, axis=0), (BLOCK_GROUPS, BLOCK_EACH))
    group_mean = tl.sum(sums, axis=1, keep_dims=True) / total
    delta = mean - tl.reshape(tl.broadcast_to(group_mean, (BLOCK_GROUPS, BLOCK_EACH)), (1, BLOCK))
    squares = tl.where(is_channel, squares + delta * delta * number, 0.0)
    squares = tl.sum(tl.reshape(tl.sum(squares, axis=0), (BLOCK_GROUPS, BLOCK_EACH)), axis=1)
    groups = tl.arange(0, BLOCK_GROUPS)
    outputs = (sample * GROUPS + groups) * spans + tl.program_id(0)
    tl.store(means_ptr + outputs, tl.reshape(group_mean, (BLOCK_GROUPS,)), mask=groups < GROUPS)
    tl.store(squares_ptr + outputs, squares, mask=groups < GROUPS)


@tuned(JOIN_CONFIGS, key=())
@triton.jit(do_not_specialize=["pixels", "span", "spans", "each"])
def group_norm_join_kernel(
    means_ptr, squares_ptr, mean_ptr, inverse_ptr, pixels, span, spans, each, EPS: tl.constexpr, BLOCK: tl.constexpr
):
    group = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    is_span = index < spans
    means = tl.load(means_ptr + group * spans + index, mask=is_span, other=0.0)
    squares = tl.load(squares_ptr + group * spans + index, mask=is_span, other=0.0)
    shares = tl.where(is_span, tl.minimum(span, pixels - index * span), 0).to(tl.float32) / pixels
    mean = tl.sum(means * shares)
    delta = means - mean
    variance = tl.sum(squares) / (1.0 * pixels * each) + tl.sum(delta * delta * shares)
    tl.store(mean_ptr + group, mean)
    tl.store(inverse_ptr + group, tl.rsqrt(variance + EPS))


@launches(group_norm_spans_kernel, group_norm_join_kernel)
@triton_op("cogvx_kernels::group_norm_statistics_triton", mutates_args=())
def group_norm_statistics(x: torch.Tensor, groups: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.group_norm_statistics` for frames whose rows of pixels are contiguous and all the same distance apart."""
    batch, time, height, width, channels = x.shape
    pixels = time * height * width
    span = max(triton.cdiv(pixels, MOST_SPANS), SMALLEST_SPAN)
    spans = triton.cdiv(pixels, span)
    means, squares = (torch.empty((batch, groups, spans), dtype=torch.float32, device=x.device) for _ in range(2))
    launch(
        group_norm_spans_kernel,
        x.device,
        (spans, batch),
        *(x, means, squares, pixels, span, spans, width),
        *(stride_of_samples(x), x.stride(2)),
        size=pixels,
        CHANNELS=channels,
        GROUPS=groups,
        BLOCK_GROUPS=triton.next_power_of_2(groups),
        BLOCK_EACH=triton.next_power_of_2(channels // groups),
        HAS_GAPS=x.stride(2) != width * channels,
    )
    mean, inverse = (torch.empty((batch, groups), dtype=torch.float32, device=x.device) for _ in range(2))
    given = (means, squares, mean, inverse, pixels, span, spans, channels // groups)
    launch(group_norm_join_kernel, x.device, (batch * groups,), *given, size=spans, EPS=eps, BLOCK=MOST_SPANS)
    return mean, inverse
