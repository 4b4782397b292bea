"""What the kernels over the joint stream share: which rows a program has, and LayerNorm with an expert's vectors.

A program takes ROWS rows of one sample and of one expert: tiles are counted from row 0 for the text and from
`text_length` for the video, so that a tile never holds both, and the expert's vectors are read once for all its rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .quantize import quantize

# What a stream kernel is launched with on every target. 8 warps hold 256 neighbouring columns each for the 2,048 that
# a row of 1,920 is padded to: one 16-byte load of 8 half-precision numbers a thread, and 8 columns of each expert
# vector to keep, however many rows there are. Two rows give the memory enough to do while the row sums cross the
# warps. Four rows halve the reads of the vectors, which come from L2; 8 warps would need 145 registers a thread for
# them where a row is 3,072 wide, so that one program filled a multiprocessor: they take 16.
ROWS_CONFIGS = [
    triton.Config({"ROWS": rows}, num_warps=num_warps, num_stages=1) for rows, num_warps in ((2, 8), (4, 16), (1, 8))
]
# One binary for streams of all lengths: their divisors tell nothing about where a row starts.
NOT_SPECIALIZED = ["sequence", "text_length"]


def grid(x: torch.Tensor, text_length: int):
    """Programs of a stream kernel on `x` `(batch, sequence, dim)`, as a function of its configuration."""
    batch, sequence, _ = x.shape
    return lambda meta: (
        triton.cdiv(text_length, meta["ROWS"]) + triton.cdiv(sequence - text_length, meta["ROWS"]),
        batch,
    )


def block_of(dim: int) -> int:
    """The power of two that holds a row."""
    return triton.next_power_of_2(dim)


def strides_of(vectors: torch.Tensor) -> tuple[int, int]:
    """Strides of the sample and of the expert in `(1 or batch, 2, dim)`; one row for all samples has stride 0."""
    return vectors.stride(0) if vectors.shape[0] > 1 else 0, vectors.stride(1)


@triton.jit
def program_rows(sequence, text_length, ROWS: tl.constexpr):
    """The rows of this program: `(rows, mask, expert)`, `rows` int64."""
    tile = tl.program_id(0)
    text_tiles = tl.cdiv(text_length, ROWS)
    is_text = tile < text_tiles
    first = tl.where(is_text, tile * ROWS, text_length + (tile - text_tiles) * ROWS)
    end = tl.where(is_text, text_length, sequence)
    rows = first + tl.arange(0, ROWS)
    # A stream of many samples has more than 2^31 elements.
    return (tl.program_id(1).to(tl.int64) * sequence + rows)[:, None], (rows < end)[:, None], (1 - is_text.to(tl.int32))


@triton.jit
def load_vector(vectors_ptr, stride_b, stride_e, expert, columns, dim):
    """This sample's vector of one expert, fp32 `(1, BLOCK)`."""
    start = vectors_ptr + tl.program_id(1).to(tl.int64) * stride_b + expert * stride_e
    return tl.load(start + columns, mask=columns < dim, other=0.0).to(tl.float32)


@triton.jit
def normalize(x, columns, dim, EPS: tl.constexpr):
    """`(x - mean) / deviation` of each row of fp32 `(ROWS, BLOCK)`; columns from `dim` on hold zeros and stay zeros."""
    mean = tl.sum(x, axis=1, keep_dims=True) / dim
    centered = tl.where(columns < dim, x - mean, 0.0)
    variance = tl.sum(centered * centered, axis=1, keep_dims=True) / dim
    return centered * tl.rsqrt(variance + EPS)


@triton.jit
def modulate(normed, weight_ptr, bias_ptr, shift, scale, columns, dim):
    """`(normed * weight + bias) * (1 + scale) + shift`; pointers may be None."""
    if weight_ptr is not None:
        normed *= tl.load(weight_ptr + columns, mask=columns < dim, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        normed += tl.load(bias_ptr + columns, mask=columns < dim, other=0.0).to(tl.float32)
    return normed * (1 + scale) + shift


@triton.jit
def store_rows(values, output_ptr, output_scale_ptr, rows, columns, mask, in_rows, dim):
    """Stores fp32 `(ROWS, BLOCK)`, zeros from `dim` on; in 8 bits with a scale for each row unless that is None."""
    if output_scale_ptr is not None:
        values, scales = quantize(values, 1, output_ptr.dtype.element_ty)
        tl.store(output_scale_ptr + rows, scales, mask=in_rows)
    tl.store(output_ptr + rows * dim + columns, values.to(output_ptr.dtype.element_ty), mask=mask)
