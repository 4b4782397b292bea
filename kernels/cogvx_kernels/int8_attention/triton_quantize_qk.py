"""`reference.quantize_qk`: 8 bits and a scale for each block of `ROWS` rows of a head, K without the mean of a sample.

One read of Q and K, and one write of them in 8 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op

from .._triton.tuned import EVERYWHERE, launch, launches, tuned
from .reference import SAMPLES
from .triton_blocks import ROWS, load_sample, outputs_of, quantize_block, sample_mean, sample_of

# A block of 128 rows and 64 channels in fp32 is 32 numbers a thread in 8 warps, Q after K: 58 registers, so that four
# programs share a multiprocessor. 4 warps spill on sm_100 where the head dim is 128.
_CONFIGS = [triton.Config({}, num_warps=num_warps, num_stages=1) for num_warps in (8, 16)]
CONFIGS = {EVERYWHERE: _CONFIGS}


@tuned(CONFIGS, key=("HEAD_DIM",))
@triton.jit(do_not_specialize=["query_sequence", "key_sequence", "sample_step", "heads"])
def quantize_qk_kernel(
    query_ptr,
    query_output_ptr,
    query_scale_ptr,
    key_ptr,
    key_output_ptr,
    key_scale_ptr,
    sample_ptr,
    query_sequence,
    key_sequence,
    sample_step,
    heads,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    FACTOR: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
):
    sample = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    block = tl.program_id(0)
    rows = block * ROWS + tl.arange(0, ROWS)[:, None]
    channels = tl.arange(0, HEAD_DIM)[None, :]
    if block * ROWS < key_sequence:
        sample_ptr += sample * stride_kb + head * stride_kh
        x, _, mask = load_sample(sample_ptr, stride_ks, key_sequence, sample_step, channels, SAMPLES)
        mean = sample_mean(x, key_sequence, sample_step, mask)
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
        quantize_block(x, FACTOR, output_tile, scale_ptr, mask)


@launches(quantize_qk_kernel)
@triton_op("cogvx_kernels::quantize_qk_triton", mutates_args=())
def quantize_qk(
    query: torch.Tensor, key: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`ops.quantize_qk` for a head dim that is a power of two; `factor` is the softmax' scale times log2(e)."""
    batch, _, heads, head_dim = query.shape
    query_int8, query_scale = outputs_of(query)
    key_int8, key_scale = outputs_of(key)
    if query.numel() == 0:
        return query_int8, query_scale, key_int8, key_scale
    sample, step = sample_of(key)
    blocks = triton.cdiv(max(query.shape[1], key.shape[1]), ROWS)
    launch(
        quantize_qk_kernel,
        query.device,
        (blocks, batch * heads),
        *(query, query_int8, query_scale),
        *(key, key_int8, key_scale, sample),
        *(query.shape[1], key.shape[1], step, heads),
        *query.stride()[:3],
        *key.stride()[:3],
        size=query.shape[1],
        FACTOR=factor,
        HEAD_DIM=head_dim,
        SAMPLES=SAMPLES,
        ROWS=ROWS,
    )
    return query_int8, query_scale, key_int8, key_scale
