"""What the two ways of Q and K to 8 bits share: blocks of rows with a scale each, and the vector that is taken off K.

K without its mean over the sequence is smaller, and softmax is blind to any vector taken off all of K: that it is the
mean need only be nearly so. Each program takes the mean of the same `SAMPLES` rows or fewer, which stay in L2, and no
launch before it has to read all of K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .reference import BLOCK_ROWS as ROWS
from .reference import sample_step

SCALE_ROUND = tl.constexpr((1 << 13) - 1)  # all but 11 of the 24 significant bits of fp32
SMALLEST = tl.constexpr(2.0**-60)  # the product of two is a normal number
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: what is added to it is rounded to an integer


@triton.jit
def quantize_block(x, FACTOR: tl.constexpr, output_tile, scale_ptr, mask):
    """Write a block of fp32 rows in 8 bits, and its scale, which has 11 significant bits; masked rows are 0 in `x`."""
    # A block with NaN has a scale that is not finite, as one with an infinity has: neither is lost in 8 bits.
    magnitude = tl.where(x == x, tl.abs(x), float("inf"))
    largest = tl.max(tl.max(magnitude, axis=1), axis=0)
    scale = tl.maximum(largest * (FACTOR / 127), SMALLEST)
    scale = ((scale.to(tl.int32, bitcast=True) + SCALE_ROUND) & ~SCALE_ROUND).to(tl.float32, bitcast=True)
    rounded = x * (FACTOR / scale) + ROUNDER
    tl.store(output_tile, rounded.to(tl.int32, bitcast=True).to(tl.int8), mask=mask)
    tl.store(scale_ptr, scale)


@triton.jit
def load_sample(sample_ptr, stride_s, sequence, step, channels, SAMPLES: tl.constexpr):
    """Every `step`-th row of one head of K in fp32, `(SAMPLES, HEAD_DIM)`, with the rows' numbers and their mask."""
    index = tl.arange(0, SAMPLES)[:, None]
    rows = index * step
    mask = rows < sequence
    x = tl.load(sample_ptr + index.to(tl.int64) * (stride_s * step) + channels, mask=mask, other=0.0)
    return x.to(tl.float32), rows, mask


@triton.jit
def sample_mean(x, sequence, step, mask):
    """The mean of `load_sample`'s rows, whatever became of them since, `(1, HEAD_DIM)`."""
    return tl.sum(tl.where(mask, x, 0.0), axis=0, keep_dims=True) / tl.cdiv(sequence, step)


def sample_of(key: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The view of K, `(batch, sequence, heads, head_dim)`, that `load_sample` reads, and the step between its rows."""
    step = sample_step(key.shape[1])
    # Not by brackets: they ask for the device, so that a graph could not be traced where no GPU is.
    return torch.ops.aten.slice(key, 1, 0, key.shape[1], step), step


def outputs_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For `(batch, sequence, heads, head_dim)`: each head's rows one after the other, seen in the order of `x`, and a
    scale for each block of them."""
    batch, sequence, heads, head_dim = x.shape
    values = torch.empty((batch, heads, sequence, head_dim), dtype=torch.int8, device=x.device)
    scales = torch.empty((batch, heads, triton.cdiv(sequence, ROWS)), dtype=torch.float32, device=x.device)
    return values.transpose(1, 2), scales
