"""`reference.quantize_value`: V without its mean over the sequence, or in e4m3 with a scale for each channel, or both.

The first launch reads V and leaves sums, largest and smallest of a few parts of the sequence: a channel's largest
distance from its mean is that of one of the two. The second reads V again and writes it: it adds the parts up in every
program (a few KiB from L2) rather than wait for a third. In 8 bits it is written with the tokens of a channel next to
each other: matrix instructions on bytes sum along what is contiguous, and V is summed over tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.library import triton_op

from .._triton.tuned import EVERYWHERE, launch, launches, tuned
from .triton_blocks import SMALLEST

FP8_MAX = tl.constexpr(448.0)
# For the 16-byte loads of the next kernel: where a channel's tokens start is a multiple of this.
ALIGNMENT = tl.constexpr(16)
# V is cut into so many parts: 480 programs or more in CogVideoX (2 samples of 30 heads or more), where a part of 17,776
# tokens is 284 KiB, long against the 768 bytes it leaves.
PARTS = 8
# 32 rows of 64 channels in 4 warps are two 16-byte loads a thread on their way at a time, in several programs on a
# multiprocessor. What a thread found stays in its registers until the end: what goes across threads once is the tile.
# Twice the rows spill where the head dim is 128.
_PARTS_CONFIGS = [triton.Config({"BLOCK": rows}, num_warps=4, num_stages=3) for rows in (32, 16)]
PARTS_CONFIGS = {EVERYWHERE: _PARTS_CONFIGS}
# A tile of 64 tokens and 64 channels is 32 numbers a thread; in 8 bits a thread has to end with 16 tokens of a channel.
_CONFIGS = [triton.Config({"BLOCK": rows}, num_warps=4, num_stages=1) for rows in (64, 32)]
CONFIGS = {EVERYWHERE: _CONFIGS}


@tuned(PARTS_CONFIGS, key=("HEAD_DIM",))
@triton.jit(do_not_specialize=["sequence", "heads"])
def value_parts_kernel(
    x_ptr,
    sums_ptr,
    largest_ptr,
    smallest_ptr,
    sequence,
    heads,
    stride_b,
    stride_s,
    stride_h,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums, and the largest and the smallest, of each part of the sequence, fp32 `(batch, heads, PARTS, HEAD_DIM)`;
    pointers may be None."""
    sample = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    part = tl.program_id(0)
    length = tl.cdiv(tl.cdiv(sequence, PARTS), BLOCK) * BLOCK
    channels = tl.arange(0, HEAD_DIM)[None, :]
    sums = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
    largest = tl.full((BLOCK, HEAD_DIM), float("-inf"), tl.float32)
    smallest = tl.full((BLOCK, HEAD_DIM), float("inf"), tl.float32)
    for start in range(part * length, min((part + 1) * length, sequence), BLOCK):
        rows = start + tl.arange(0, BLOCK)[:, None]
        tile = x_ptr + sample * stride_b + head * stride_h + rows.to(tl.int64) * stride_s + channels
        mask = rows < sequence
        x = tl.load(tile, mask=mask, other=0.0).to(tl.float32)
        if sums_ptr is not None:
            sums += x
        if largest_ptr is not None:
            largest = tl.maximum(largest, tl.where(mask, x, float("-inf")))
            smallest = tl.minimum(smallest, tl.where(mask, x, float("inf")))
    output = (tl.program_id(1) * PARTS + part) * HEAD_DIM + tl.arange(0, HEAD_DIM)
    if sums_ptr is not None:
        tl.store(sums_ptr + output, tl.sum(sums, axis=0))
    if largest_ptr is not None:
        tl.store(largest_ptr + output, tl.max(largest, axis=0))
        tl.store(smallest_ptr + output, tl.min(smallest, axis=0))


@tuned(CONFIGS, key=("HEAD_DIM",))
@triton.jit(do_not_specialize=["sequence", "heads"])
def quantize_value_kernel(
    x_ptr,
    output_ptr,
    sums_ptr,
    largest_ptr,
    smallest_ptr,
    mean_ptr,
    scale_ptr,
    sequence,
    heads,
    stride_b,
    stride_s,
    stride_h,
    stride_ob,
    stride_os,
    stride_oh,
    stride_od,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    channels = tl.arange(0, HEAD_DIM)[None, :]
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    mask = rows < sequence
    parts = (tl.program_id(1) * PARTS + tl.arange(0, PARTS)[:, None]) * HEAD_DIM + channels
    vector = tl.program_id(1) * HEAD_DIM + channels
    tile = x_ptr + sample * stride_b + head * stride_h + rows.to(tl.int64) * stride_s + channels
    x = tl.load(tile, mask=mask, other=0.0).to(tl.float32)
    mean = tl.zeros((1, HEAD_DIM), tl.float32)
    if sums_ptr is not None:
        mean = tl.sum(tl.load(sums_ptr + parts), axis=0, keep_dims=True) / sequence
        x -= mean
        if tl.program_id(0) == 0:
            tl.store(mean_ptr + vector, mean)
    if scale_ptr is not None:
        above = tl.max(tl.load(largest_ptr + parts), axis=0, keep_dims=True) - mean
        below = mean - tl.min(tl.load(smallest_ptr + parts), axis=0, keep_dims=True)
        scale = tl.maximum(tl.maximum(above, below) / FP8_MAX, SMALLEST)
        x /= scale
        if tl.program_id(0) == 0:
            tl.store(scale_ptr + vector, scale)
    if output_ptr.dtype.element_ty == tl.float8e4nv:
        # Up to where the memory of a channel ends: so many tokens are whole 16-byte stores.
        x = tl.where(mask, x, 0.0)
        mask = rows < tl.cdiv(sequence, ALIGNMENT) * ALIGNMENT
    output = output_ptr + sample * stride_ob + head * stride_oh + rows.to(tl.int64) * stride_os + channels * stride_od
    tl.store(output, x.to(output_ptr.dtype.element_ty), mask=mask)


@launches(value_parts_kernel, quantize_value_kernel)
@triton_op("cogvx_kernels::quantize_value_triton", mutates_args=())
def quantize_value(
    value: torch.Tensor, dtype: torch.dtype, smooth: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`reference.quantize_value`; a scale or mean that it would give as None is empty."""
    batch, sequence, heads, head_dim = value.shape
    bytes_only = dtype.itemsize == 1
    if bytes_only:
        tokens = triton.cdiv(sequence, ALIGNMENT.value) * ALIGNMENT.value
        values = torch.empty((batch, heads, head_dim, tokens), dtype=dtype, device=value.device)
        values = values.narrow(3, 0, sequence).permute(0, 3, 1, 2)
    else:
        values = torch.empty((batch, heads, sequence, head_dim), dtype=dtype, device=value.device).transpose(1, 2)

    def vector(wanted: bool, *parts: int) -> torch.Tensor | None:
        shape = (batch, heads, *parts, head_dim)
        return torch.empty(shape, dtype=torch.float32, device=value.device) if wanted else None

    mean, scale = vector(smooth), vector(bytes_only)
    if value.numel() > 0:
        parts = vector(smooth, PARTS), vector(bytes_only, PARTS), vector(bytes_only, PARTS)
        sizes = (sequence, heads, *value.stride()[:3])
        given: dict[str, Any] = {"size": sequence, "HEAD_DIM": head_dim, "PARTS": PARTS}
        launch(value_parts_kernel, value.device, (PARTS, batch * heads), value, *parts, *sizes, **given)
        launch(
            quantize_value_kernel,
            value.device,
            lambda meta: (triton.cdiv(sequence, meta["BLOCK"]), batch * heads),
            *(value, values, *parts, mean, scale, *sizes, *values.stride()),
            **given,
        )
    # An operation of torch returns tensors, and no None.
    none = torch.empty(0, dtype=torch.float32, device=value.device)
    return values, none if scale is None else scale, none if mean is None else mean
