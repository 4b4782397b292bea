"""`reference.quantize_qk`: 8 bits and a scale for each block of `ROWS` rows of a head, K without its mean.

Two launches. K's mean needs all rows before the first can be quantized, so the first reads K and leaves the sums of a
few parts of the sequence: the second, which reads Q and K and writes them in 8 bits, adds those up in every program
(2 KiB from L2 beside the 32 KiB it reads of Q and K) rather than wait for a third.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from ..reference import BLOCK_ROWS as ROWS
from .targets import TARGETS, tuned

# K is cut into so many parts for its sums: 480 programs or more in CogVideoX (2 samples of 30 heads or more), where a
# part of 17,776 tokens is 284 KiB, long against the 256 bytes of sums it leaves.
PARTS = 8
# 64 rows of 64 channels in 4 warps are four 16-byte loads a thread on their way at a time. The sums of a thread stay in
# its registers until the end: what is added up across threads once is the tile. Twice the rows spill where the head dim
# is 128 and the largest and smallest are kept.
_SUM_CONFIGS = [triton.Config({"BLOCK": rows}, num_warps=4, num_stages=3) for rows in (64, 32)]
SUM_CONFIGS = dict.fromkeys(TARGETS, _SUM_CONFIGS)
# A block of 128 rows and 64 channels in fp32 is 32 numbers a thread in 8 warps, Q after K: 58 registers, so that four
# programs share a multiprocessor. 4 warps spill on sm_100 where the head dim is 128.
_CONFIGS = [triton.Config({}, num_warps=num_warps, num_stages=1) for num_warps in (8, 16)]
CONFIGS = dict.fromkeys(TARGETS, _CONFIGS)

SCALE_ROUND = tl.constexpr((1 << 13) - 1)  # all but 11 of the 24 significant bits of fp32
SMALLEST = tl.constexpr(2.0**-60)  # the product of two is a normal number
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: what is added to it is rounded to an integer


@tuned(SUM_CONFIGS, key=("HEAD_DIM",))
@triton.jit(do_not_specialize=["sequence", "heads"])
def sequence_sums_kernel(
    x_ptr,
    sums_ptr,
    sequence,
    heads,
    stride_b,
    stride_s,
    stride_h,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over each of PARTS parts of the sequence, fp32 `(batch, heads, PARTS, HEAD_DIM)`."""
    sample = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    part = tl.program_id(0)
    length = tl.cdiv(tl.cdiv(sequence, PARTS), BLOCK) * BLOCK
    channels = tl.arange(0, HEAD_DIM)[None, :]
    sums = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
    for start in range(part * length, min((part + 1) * length, sequence), BLOCK):
        rows = start + tl.arange(0, BLOCK)[:, None]
        tile = x_ptr + sample * stride_b + head * stride_h + rows.to(tl.int64) * stride_s + channels
        sums += tl.load(tile, mask=rows < sequence, other=0.0).to(tl.float32)
    output = sums_ptr + (tl.program_id(1) * PARTS + part) * HEAD_DIM + tl.arange(0, HEAD_DIM)
    tl.store(output, tl.sum(sums, axis=0))


@triton.jit
def quantize_block(x, factor, output_tile, scale_ptr, mask):
    """Write a block of fp32 rows in 8 bits, and its scale, which has 11 significant bits; masked rows are 0 in `x`."""
    # A block with NaN has a scale that is not finite, as one with an infinity has: neither is lost in 8 bits.
    magnitude = tl.where(x == x, tl.abs(x), float("inf"))
    largest = tl.max(tl.max(magnitude, axis=1), axis=0)
    scale = tl.maximum(largest * (factor / 127), SMALLEST)
    scale = ((scale.to(tl.int32, bitcast=True) + SCALE_ROUND) & ~SCALE_ROUND).to(tl.float32, bitcast=True)
    rounded = x * (factor / scale) + ROUNDER
    tl.store(output_tile, rounded.to(tl.int32, bitcast=True).to(tl.int8), mask=mask)
    tl.store(scale_ptr, scale)


@tuned(CONFIGS, key=("HEAD_DIM",))
@triton.jit(do_not_specialize=["query_sequence", "key_sequence", "heads"])
def quantize_qk_kernel(
    query_ptr,
    query_output_ptr,
    query_scale_ptr,
    key_ptr,
    key_output_ptr,
    key_scale_ptr,
    key_sums_ptr,
    query_sequence,
    key_sequence,
    heads,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    factor,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    sample = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    block = tl.program_id(0)
    rows = block * ROWS + tl.arange(0, ROWS)[:, None]
    channels = tl.arange(0, HEAD_DIM)[None, :]
    if block * ROWS < key_sequence:
        parts = (tl.program_id(1) * PARTS + tl.arange(0, PARTS)[:, None]) * HEAD_DIM
        mean = tl.sum(tl.load(key_sums_ptr + parts + channels), axis=0, keep_dims=True) / key_sequence
        mask = rows < key_sequence
        tile = key_ptr + sample * stride_kb + head * stride_kh + rows.to(tl.int64) * stride_ks + channels
        x = tl.where(mask, tl.load(tile, mask=mask, other=0.0).to(tl.float32) - mean, 0.0)
        output_tile = key_output_ptr + (tl.program_id(1).to(tl.int64) * key_sequence + rows) * HEAD_DIM + channels
        scale_ptr = key_scale_ptr + tl.program_id(1) * tl.cdiv(key_sequence, ROWS) + block
        quantize_block(x, 1.0, output_tile, scale_ptr, mask)
    if block * ROWS < query_sequence:
        mask = rows < query_sequence
        tile = query_ptr + sample * stride_qb + head * stride_qh + rows.to(tl.int64) * stride_qs + channels
        x = tl.load(tile, mask=mask, other=0.0).to(tl.float32)
        output_tile = query_output_ptr + (tl.program_id(1).to(tl.int64) * query_sequence + rows) * HEAD_DIM + channels
        scale_ptr = query_scale_ptr + tl.program_id(1) * tl.cdiv(query_sequence, ROWS) + block
        quantize_block(x, factor, output_tile, scale_ptr, mask)


def sequence_sums(x: torch.Tensor) -> torch.Tensor:
    """Launch `sequence_sums_kernel` on `(batch, sequence, heads, head_dim)` from within an operation."""
    batch, sequence, heads, head_dim = x.shape
    sums = torch.empty((batch, heads, PARTS, head_dim), dtype=torch.float32, device=x.device)
    wrap_triton(sequence_sums_kernel(x.device))[(PARTS, batch * heads)](
        x, sums, sequence, heads, *x.stride()[:3], HEAD_DIM=head_dim, PARTS=PARTS
    )
    return sums


@triton_op("cogvx_kernels::quantize_qk_triton", mutates_args=())
def quantize_qk(
    query: torch.Tensor, key: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`ops.quantize_qk` for a head dim that is a power of two; `factor` is the softmax' scale times log2(e)."""
    batch, _, heads, head_dim = query.shape

    def outputs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each head's rows one after the other, seen in the order of `x`, and a scale for each block of them."""
        sequence = x.shape[1]
        values = torch.empty((batch, heads, sequence, head_dim), dtype=torch.int8, device=x.device)
        scales = torch.empty((batch, heads, triton.cdiv(sequence, ROWS)), dtype=torch.float32, device=x.device)
        return values.transpose(1, 2), scales

    query_int8, query_scale = outputs(query)
    key_int8, key_scale = outputs(key)
    if query.numel() == 0:
        return query_int8, query_scale, key_int8, key_scale
    blocks = triton.cdiv(max(query.shape[1], key.shape[1]), ROWS)
    wrap_triton(quantize_qk_kernel(query.device))[(blocks, batch * heads)](
        query,
        query_int8,
        query_scale,
        key,
        key_int8,
        key_scale,
        sequence_sums(key),
        query.shape[1],
        key.shape[1],
        heads,
        *query.stride()[:3],
        *key.stride()[:3],
        factor,
        HEAD_DIM=head_dim,
        PARTS=PARTS,
        ROWS=ROWS,
    )
    return query_int8, query_scale, key_int8, key_scale
