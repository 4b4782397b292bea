"""`reference.attention` with online softmax: scores never leave the multiprocessor.

After FlashAttention-2 (Dao, arXiv:2307.08691): a program holds a tile of queries and walks over all keys, with a
running maximum and sum for each query. The softmax is in powers of two, the scale's log2(e) folded into one
multiply-add with the maximum. Scores, sums and the output are fp32; probabilities are rounded to the dtype of V for
their product with it.

Programs that run at the same time share a head: its K and V, 4.6 MB for the 17,776 tokens of CogVideoX-2b, stay in L2
(24 MB and more, but 6 on sm_86, and 4 for each die of gfx942, with 256 behind them) while its tiles of queries are
worked off.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op

from .._triton.tuned import TunedKernel, launch, launches

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128)
LOG2_E = 1.4426950408889634


def _config(queries: int, keys: int, num_warps: int, num_stages: int) -> triton.Config:
    return triton.Config({"BLOCK_M": queries, "BLOCK_N": keys}, num_warps=num_warps, num_stages=num_stages)


# Targets without wgmma read K and V from shared memory once for every 16 rows of queries in a warp's tile: with 32 rows
# a warp that takes half as long as the products do, with 16 as long. So there are 128 queries for 4 warps, at 255
# registers without a spill, two programs to a multiprocessor. A head dim of 128 has no registers for that: 8 warps.
_AMPERE_64 = [_config(128, 64, 4, 3), _config(128, 32, 4, 4), _config(256, 64, 8, 3)]
_AMPERE_128 = [_config(128, 64, 8, 2), _config(128, 32, 8, 3)]
# 99 KiB of shared memory a program: fewer stages.
_ADA_64 = [_config(128, 64, 4, 3), _config(128, 32, 4, 3)]
_ADA_128 = [_config(128, 32, 8, 2), _config(128, 64, 8, 2)]
# The code for this target has fewer registers left over: 64 keys for 128 queries and 4 warps spill.
_BLACKWELL_RTX_64 = [_config(128, 32, 4, 3), _config(64, 64, 4, 3)]
_BLACKWELL_RTX_128 = [_config(128, 64, 8, 2), _config(64, 32, 8, 3)]
# wgmma and tcgen05 read shared memory themselves. Exponentials take as long as the products at head dim 64, so
# something else has to run during either: two programs (64 keys), or the other warp group (128 keys). 4 warps spill.
_HOPPER_64 = [_config(128, 64, 8, 3), _config(128, 128, 8, 2)]
_HOPPER_128 = [_config(128, 64, 8, 2), _config(128, 128, 8, 2)]
# 64 KiB of shared memory, where one stage leaves room for two programs.
_CDNA_64 = [_config(128, 64, 4, 1), _config(128, 64, 4, 2), _config(256, 64, 8, 1)]
_CDNA_128 = [_config(128, 64, 8, 1), _config(128, 32, 4, 1)]
CONFIGS = {
    64: {
        "a100": _AMPERE_64,
        "rtx": _ADA_64,
        "hopper": _HOPPER_64,
        "blackwell": _HOPPER_64,
        "rtx-blackwell": _BLACKWELL_RTX_64,
        "cdna": _CDNA_64,
    },
    128: {
        "a100": _AMPERE_128,
        "rtx": _ADA_128,
        "hopper": _HOPPER_128,
        "blackwell": _HOPPER_128,
        "rtx-blackwell": _BLACKWELL_RTX_128,
        "cdna": _CDNA_128,
    },
}


@triton.jit
def _attend(
    query,
    maximum,
    total,
    output,
    key_tile,
    value_tile,
    num_keys,
    SCALE_LOG2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of keys: the new running maximum, sum and output of each query. MASKED: only `num_keys` are there."""
    if MASKED:
        tokens = tl.arange(0, BLOCK_N)
        scores = tl.dot(query, tl.load(key_tile, mask=tokens[None, :] < num_keys, other=0.0))
        scores = tl.where(tokens[None, :] < num_keys, scores, float("-inf"))
        value = tl.load(value_tile, mask=tokens[:, None] < num_keys, other=0.0)
    else:
        scores = tl.dot(query, tl.load(key_tile))
        value = tl.load(value_tile)
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1) * SCALE_LOG2)
    weights = tl.exp2(scores * SCALE_LOG2 - new_maximum[:, None])
    correction = tl.exp2(maximum - new_maximum)
    total = total * correction + tl.sum(weights, axis=1)
    output = tl.dot(weights.to(value.dtype), value, output * correction[:, None])
    return new_maximum, total, output


@triton.jit(do_not_specialize=["query_sequence", "key_sequence", "heads"])
def attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    output_ptr,
    query_sequence,
    key_sequence,
    heads,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_ob,
    stride_os,
    stride_oh,
    SCALE_LOG2: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    sample = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    channels = tl.arange(0, HEAD_DIM)[None, :]
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    in_rows = rows < query_sequence
    query_tile = query_ptr + sample * stride_qb + head * stride_qh + rows.to(tl.int64) * stride_qs + channels
    query = tl.load(query_tile, mask=in_rows, other=0.0)
    key_ptr += sample * stride_kb + head * stride_kh
    value_ptr += sample * stride_vb + head * stride_vh
    # Where a tile's elements are does not change, but where the tile is: one addition for it, none for them.
    keys = tl.arange(0, BLOCK_N)
    key_offsets = keys[None, :] * stride_ks + tl.arange(0, HEAD_DIM)[:, None]
    value_offsets = keys[:, None] * stride_vs + channels

    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    output = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    for _ in range(0, key_sequence // BLOCK_N):
        maximum, total, output = _attend(
            query,
            maximum,
            total,
            output,
            key_ptr + key_offsets,
            value_ptr + value_offsets,
            BLOCK_N,
            SCALE_LOG2,
            BLOCK_N,
            False,
        )
        key_ptr += BLOCK_N * stride_ks
        value_ptr += BLOCK_N * stride_vs
    num_keys = key_sequence % BLOCK_N
    if num_keys > 0:
        maximum, total, output = _attend(
            query,
            maximum,
            total,
            output,
            key_ptr + key_offsets,
            value_ptr + value_offsets,
            num_keys,
            SCALE_LOG2,
            BLOCK_N,
            True,
        )
    output = (output / total[:, None]).to(output_ptr.dtype.element_ty)
    output_tile = output_ptr + sample * stride_ob + head * stride_oh + rows.to(tl.int64) * stride_os + channels
    tl.store(output_tile, output, mask=in_rows)


KERNELS = {head_dim: TunedKernel(attention_kernel, CONFIGS[head_dim], key=()) for head_dim in HEAD_DIMS}


@launches(attention_kernel)
@triton_op("cogvx_kernels::attention_triton", mutates_args=())
def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """`ops.attention` for a `scale` above 0, a head dim of `HEAD_DIMS` and a dtype of `DTYPES`."""
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if output.numel() == 0:
        return output
    batch, sequence, heads, head_dim = query.shape
    launch(
        KERNELS[head_dim],
        query.device,
        lambda meta: (triton.cdiv(sequence, meta["BLOCK_M"]), batch * heads),
        *(query, key, value, output),
        *(sequence, key.shape[1], heads),
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *output.stride()[:3],
        size=sequence,
        SCALE_LOG2=scale * LOG2_E,
        HEAD_DIM=head_dim,
    )
    return output
