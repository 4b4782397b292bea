"""`reference.int8_attention` with online softmax: Q and K in 8 bits, P and V in V's dtype, all sums in fp32.

After SageAttention (Zhang et al., arXiv:2410.02367) and SageAttention2 (arXiv:2411.10958). A tile of queries and a tile
of keys lie in one block of `ROWS` each, so that one number, the product of their scales, turns the int32 products of a
tile into exponents of two.

Integers become floats without a conversion, which would take a quarter or less of the rate of other instructions:
their sum starts at 0x4B400000, the bits of 1.5 * 2^23, where a step of one in the bits is a step of 1.0 in the float.
A sum of D products is below 127 * 127 * 128 < 2^22 in magnitude, so the bits are those of `1.5 * 2^23 + sum`, and the
offset leaves with the multiply-add that scales and subtracts the maximum. To keep that exact, scales have 11
significant bits: the product of two has 22, and 24 with the 3 of 1.5 * 2^23, which fp32 holds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op

from .._triton.tuned import EVERYWHERE, TunedKernel, launch, launches
from .triton_blocks import ROWS
from .triton_exp2 import exp2

HEAD_DIMS = (64, 128)
FLOAT_OFFSET = tl.constexpr(12582912.0)  # 1.5 * 2^23
FLOAT_OFFSET_BITS = tl.constexpr(0x4B400000)
# Probabilities are at most 1: eight more powers of two fill the range of e4m3, which ends at 448.
FP8_EXPONENT = tl.constexpr(8.0)


def _config(queries: int, keys: int, num_warps: int, num_stages: int, soft: int = 0) -> triton.Config:
    tiles = {"BLOCK_M": queries, "BLOCK_N": keys, "SOFT_EXP2": soft}
    return triton.Config(tiles, num_warps=num_warps, num_stages=num_stages)


# As in `attention`: 32 rows of queries a warp, so that shared memory is read in half the time of the products. K takes
# half the room, and on the targets with 99 KiB a third stage fits.
_AMPERE_64 = [_config(128, 64, 4, 3), _config(128, 32, 4, 3)]
_AMPERE_128 = [_config(128, 64, 8, 2), _config(128, 32, 8, 3)]
# wgmma starts from registers that have to be set to the offset, one more instruction for each score: with that, issuing
# takes as long as the exponentials, and both longer than the products. 128 keys spread what a tile costs besides. Which
# of the two holds a multiprocessor back is the tuner's to find: the last trades an eighth of the exponentials for ten
# instructions each.
_HOPPER_64 = [_config(128, 128, 8, 2), _config(128, 64, 8, 3), _config(128, 128, 8, 2, soft=8)]
_HOPPER_128 = [_config(128, 128, 8, 2), _config(128, 64, 8, 2)]
# Triton has no tcgen05 for integers: Q and K are multiplied by mma.sync, P and V by tcgen05.
_BLACKWELL_64 = [_config(128, 64, 8, 3), _config(128, 128, 8, 2)]
_BLACKWELL_128 = [_config(128, 64, 8, 2)]
# Three programs share a multiprocessor with one stage, two with two.
_CDNA_64 = [_config(128, 64, 4, 1), _config(128, 64, 4, 2)]
_CDNA_128 = [_config(128, 64, 4, 1), _config(128, 32, 4, 1)]
CONFIGS = {
    64: {
        "hopper": _HOPPER_64,
        "blackwell": _BLACKWELL_64,
        "cdna": _CDNA_64,
        EVERYWHERE: _AMPERE_64,
    },
    128: {
        "hopper": _HOPPER_128,
        "blackwell": _BLACKWELL_128,
        "cdna": _CDNA_128,
        EVERYWHERE: _AMPERE_128,
    },
}
# V in 8 bits needs the sums of a tile beside those of all tiles: 32 rows a warp spill with 64 keys. 16 rows take 172
# registers; shared memory is read twice as often, but what is read is half as long.
_ADA_FP8_64 = [_config(128, 64, 8, 3), _config(128, 32, 4, 3), _config(64, 64, 4, 3)]
_ADA_FP8_128 = [_config(128, 64, 8, 2), _config(128, 32, 8, 2)]
FP8_CONFIGS = {
    64: {"hopper": _HOPPER_64[:2], "blackwell": _BLACKWELL_64, EVERYWHERE: _ADA_FP8_64},
    128: {"hopper": _HOPPER_128, "blackwell": _BLACKWELL_128, EVERYWHERE: _ADA_FP8_128},
}
NO_E4M3 = dict.fromkeys(("a100", "cdna"), "its tensor cores multiply no e4m3")


@triton.jit
def _attend(
    query,
    query_scale,
    maximum,
    total,
    output,
    key_tile,
    key_scale,
    value_tile,
    num_keys,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFT_EXP2: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of keys: the new running maximum, sum and output of each query. MASKED: only `num_keys` are there.

    Beside `zero`, the scaled offset of this tile's scores, a maximum has coarser steps. `new_maximum` is what is left
    of it there: the weights of this tile and the correction of all before are relative to one number, exactly.
    """
    sums = tl.full((BLOCK_M, BLOCK_N), FLOAT_OFFSET_BITS, tl.int32)
    if MASKED:
        tokens = tl.arange(0, BLOCK_N)
        key = tl.load(key_tile, mask=tokens[None, :] < num_keys, other=0)
        value = tl.load(value_tile, mask=tokens[:, None] < num_keys, other=0.0)
    else:
        key = tl.load(key_tile)
        value = tl.load(value_tile)
    scores = tl.dot(query, key, sums, out_dtype=tl.int32).to(tl.float32, bitcast=True)
    if MASKED:
        scores = tl.where(tokens[None, :] < num_keys, scores, float("-inf"))
    scale = query_scale * key_scale
    zero = scale * FLOAT_OFFSET
    offset = tl.maximum(maximum, tl.max(scores, axis=1) * scale - zero) + zero
    new_maximum = offset - zero
    correction = tl.exp2(maximum - new_maximum)
    if value.dtype == tl.float8e4nv:
        offset -= FP8_EXPONENT
    weights = exp2(scores * scale - offset[:, None], SOFT_EXP2)
    total = total * correction + tl.sum(weights, axis=1)
    if value.dtype == tl.float8e4nv:
        # Where products of 8 bits are summed, sums have 13 bits or so (SageAttention2, 3.4): those of a tile, no more.
        tile_output = tl.dot(weights.to(value.dtype), value, max_num_imprecise_acc=BLOCK_N)
        output = output * correction[:, None] + tile_output
    else:
        output = tl.dot(weights.to(value.dtype), value, output * correction[:, None])
    return new_maximum, total, output


@triton.jit(do_not_specialize=["query_sequence", "key_sequence", "heads"])
def int8_attention_kernel(
    query_ptr,
    query_scale_ptr,
    key_ptr,
    key_scale_ptr,
    value_ptr,
    value_scale_ptr,
    value_mean_ptr,
    output_ptr,
    guard_ptr,
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
    stride_vd,
    stride_ob,
    stride_os,
    stride_oh,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFT_EXP2: tl.constexpr,
):
    sample = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    channels = tl.arange(0, HEAD_DIM)[None, :]
    first = tl.program_id(0) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)[:, None]
    in_rows = rows < query_sequence
    query_tile = query_ptr + sample * stride_qb + head * stride_qh + rows.to(tl.int64) * stride_qs + channels
    query = tl.load(query_tile, mask=in_rows, other=0)
    query_scale = tl.load(query_scale_ptr + tl.program_id(1) * tl.cdiv(query_sequence, ROWS) + first // ROWS)
    key_ptr += sample * stride_kb + head * stride_kh
    key_scale_ptr += tl.program_id(1) * tl.cdiv(key_sequence, ROWS)
    value_ptr += sample * stride_vb + head * stride_vh
    keys = tl.arange(0, BLOCK_N)
    key_offsets = keys[None, :] * stride_ks + tl.arange(0, HEAD_DIM)[:, None]
    value_offsets = keys[:, None] * stride_vs + channels * stride_vd

    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    output = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    for start in range(0, key_sequence // BLOCK_N * BLOCK_N, BLOCK_N):
        maximum, total, output = _attend(
            query,
            query_scale,
            maximum,
            total,
            output,
            key_ptr + key_offsets,
            tl.load(key_scale_ptr + start // ROWS),
            value_ptr + value_offsets,
            BLOCK_N,
            BLOCK_M,
            BLOCK_N,
            SOFT_EXP2,
            False,
        )
        key_ptr += BLOCK_N * stride_ks
        value_ptr += BLOCK_N * stride_vs
    num_keys = key_sequence % BLOCK_N
    if num_keys > 0:
        maximum, total, output = _attend(
            query,
            query_scale,
            maximum,
            total,
            output,
            key_ptr + key_offsets,
            tl.load(key_scale_ptr + (key_sequence - num_keys) // ROWS),
            value_ptr + value_offsets,
            num_keys,
            BLOCK_M,
            BLOCK_N,
            SOFT_EXP2,
            True,
        )
    output /= total[:, None]
    if value_scale_ptr is not None:
        output *= tl.load(value_scale_ptr + tl.program_id(1) * HEAD_DIM + channels)
    if value_mean_ptr is not None:
        output += tl.load(value_mean_ptr + tl.program_id(1) * HEAD_DIM + channels)
    output = output.to(output_ptr.dtype.element_ty)
    if guard_ptr is not None:
        # After rounding: what overflows the output's dtype counts. Whoever stores stores the same, so no atomic.
        finite = tl.abs(output.to(tl.float32)) < float("inf")
        failures = tl.sum(tl.sum((in_rows & (finite == 0)).to(tl.int32), axis=1), axis=0)
        tl.store(guard_ptr, 1, mask=failures > 0)
    output_tile = output_ptr + sample * stride_ob + head * stride_oh + rows.to(tl.int64) * stride_os + channels
    tl.store(output_tile, output, mask=in_rows)


# By head dim, and whether V has 8 bits.
KERNELS = {
    (head_dim, fp8): TunedKernel(int8_attention_kernel, configs[head_dim], (), without)
    for fp8, configs, without in ((False, CONFIGS, None), (True, FP8_CONFIGS, NO_E4M3))
    for head_dim in HEAD_DIMS
}


@launches(int8_attention_kernel)
@triton_op("cogvx_kernels::int8_attention_triton", mutates_args=("guard",))
def int8_attention(
    query: torch.Tensor,
    query_scale: torch.Tensor,
    key: torch.Tensor,
    key_scale: torch.Tensor,
    value: torch.Tensor,
    value_scale: torch.Tensor | None,
    value_mean: torch.Tensor | None,
    guard: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Attention of what `quantize_qk` and `quantize_value` gave, in `dtype`.

    Args:
        query, key: int8 `(batch, sequence, heads, head_dim)`, their scales as `quantize_qk` returns them.
        value: fp16 or bf16 of the shape of `key`, or e4m3 with `value_scale`; any strides.
        value_scale, value_mean: fp32 `(batch, heads, head_dim)`, applied to the output.
        guard: int32 of one element, set to 1 if any number of the output is not finite, and not touched otherwise.
    """
    output = torch.empty(query.shape, dtype=dtype, device=query.device)
    if output.numel() == 0:
        return output
    batch, sequence, heads, head_dim = query.shape
    launch(
        KERNELS[head_dim, value.dtype.itemsize == 1],
        query.device,
        lambda meta: (triton.cdiv(sequence, meta["BLOCK_M"]), batch * heads),
        *(query, query_scale, key, key_scale),
        *(value, value_scale, value_mean, output, guard),
        *(sequence, key.shape[1], heads),
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride(),
        *output.stride()[:3],
        size=sequence,
        HEAD_DIM=head_dim,
        ROWS=ROWS,
    )
    return output
