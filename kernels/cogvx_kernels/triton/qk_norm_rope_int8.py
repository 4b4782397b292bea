"""`reference.qk_norm_rope_int8`: Q and K of the packed projection to what `int8_attention` multiplies, in two launches.

K's mean needs all rows, normed and rotated, before the first can be quantized. Writing them for that would move them
twice more: they are computed twice instead. With 2 bytes an element of the stream as the unit, the first launch reads K
(1), the second Q and K (2) and writes them in 8 bits (1): 4, as many as `qk_norm_rope` in 16 bits, where
`qk_norm_rope` and `quantize_qk` one after the other move 8.

A program has a block of one head, which shares a scale; all heads of a token turn by the same angles, read from L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from .qk_norm_rope import normed_and_rotated
from .quantize_qk import PARTS, ROWS, quantize_block
from .targets import TARGETS, tuned

# Tiles of K, cosines, sines and sums are 64 numbers a thread for 32 rows of 64 channels in 4 warps, in 80 registers:
# six programs to a multiprocessor. 64 rows in 8 warps take 100 for the same.
_SUM_CONFIGS = [
    triton.Config({"BLOCK": rows}, num_warps=num_warps, num_stages=1) for rows, num_warps in ((32, 4), (64, 8))
]
SUM_CONFIGS = dict.fromkeys(TARGETS, _SUM_CONFIGS)
# A block is 128 rows: 32 numbers a thread each of K, cosines and sines in 8 warps, on their way together. 16 warps have
# more of them on their way, in 88 to 100 registers instead of 146 to 166: one program either way.
_CONFIGS = [triton.Config({}, num_warps=num_warps, num_stages=1) for num_warps in (8, 16)]
CONFIGS = dict.fromkeys(TARGETS, _CONFIGS)


@triton.jit
def _angles(cosines_ptr, sines_ptr, rows, channels, mask, text_length, HEAD_DIM: tl.constexpr):
    """Cosines and sines of a tile of rows; text rows turn by no angle."""
    video = rows - text_length
    turns = mask & (video >= 0)
    cosines = tl.load(cosines_ptr + video * HEAD_DIM + channels, mask=turns, other=1.0).to(tl.float32)
    sines = tl.load(sines_ptr + video * HEAD_DIM + channels, mask=turns, other=0.0).to(tl.float32)
    return cosines, sines


@tuned(SUM_CONFIGS, key=("HEAD_DIM",))
@triton.jit(do_not_specialize=["sequence", "text_length", "heads"])
def key_norm_rope_sums_kernel(
    key_ptr,
    weight_ptr,
    bias_ptr,
    sums_ptr,
    cosines_ptr,
    sines_ptr,
    sequence,
    text_length,
    heads,
    stride_b,
    stride_s,
    stride_h,
    eps,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of normed and rotated K over each of PARTS parts of the sequence, as `sequence_sums_kernel` leaves them."""
    sample = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    part = tl.program_id(0)
    length = tl.cdiv(tl.cdiv(sequence, PARTS), BLOCK) * BLOCK
    channels = tl.arange(0, HEAD_DIM)[None, :]
    sums = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
    for start in range(part * length, min((part + 1) * length, sequence), BLOCK):
        rows = start + tl.arange(0, BLOCK)[:, None]
        mask = rows < sequence
        cosines, sines = None, None
        if cosines_ptr is not None:
            cosines, sines = _angles(cosines_ptr, sines_ptr, rows, channels, mask, text_length, HEAD_DIM)
        tile = key_ptr + sample * stride_b + head * stride_h + rows.to(tl.int64) * stride_s + channels
        x = tl.load(tile, mask=mask, other=0.0).to(tl.float32)
        x = normed_and_rotated(
            x, weight_ptr, bias_ptr, cosines, sines, channels, eps, HEAD_DIM, cosines_ptr is not None
        )
        sums += tl.where(mask, x, 0.0)
    output = sums_ptr + (tl.program_id(1) * PARTS + part) * HEAD_DIM + tl.arange(0, HEAD_DIM)
    tl.store(output, tl.sum(sums, axis=0))


@tuned(CONFIGS, key=("HEAD_DIM",))
@triton.jit(do_not_specialize=["sequence", "text_length", "heads"])
def qk_norm_rope_int8_kernel(
    query_ptr,
    query_weight_ptr,
    query_bias_ptr,
    query_output_ptr,
    query_scale_ptr,
    key_ptr,
    key_weight_ptr,
    key_bias_ptr,
    key_output_ptr,
    key_scale_ptr,
    key_sums_ptr,
    cosines_ptr,
    sines_ptr,
    sequence,
    text_length,
    heads,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    eps,
    factor,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    sample = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    mask = rows < sequence
    channels = tl.arange(0, HEAD_DIM)[None, :]
    cosines, sines = None, None
    if cosines_ptr is not None:
        cosines, sines = _angles(cosines_ptr, sines_ptr, rows, channels, mask, text_length, HEAD_DIM)
    output = (tl.program_id(1).to(tl.int64) * sequence + rows) * HEAD_DIM + channels
    scale = tl.program_id(1) * tl.cdiv(sequence, ROWS) + tl.program_id(0)
    ROTATES: tl.constexpr = cosines_ptr is not None

    parts = (tl.program_id(1) * PARTS + tl.arange(0, PARTS)[:, None]) * HEAD_DIM
    mean = tl.sum(tl.load(key_sums_ptr + parts + channels), axis=0, keep_dims=True) / sequence
    tile = key_ptr + sample * stride_kb + head * stride_kh + rows.to(tl.int64) * stride_ks + channels
    x = tl.load(tile, mask=mask, other=0.0).to(tl.float32)
    x = normed_and_rotated(x, key_weight_ptr, key_bias_ptr, cosines, sines, channels, eps, HEAD_DIM, ROTATES)
    quantize_block(tl.where(mask, x - mean, 0.0), 1.0, key_output_ptr + output, key_scale_ptr + scale, mask)

    tile = query_ptr + sample * stride_qb + head * stride_qh + rows.to(tl.int64) * stride_qs + channels
    x = tl.load(tile, mask=mask, other=0.0).to(tl.float32)
    x = normed_and_rotated(x, query_weight_ptr, query_bias_ptr, cosines, sines, channels, eps, HEAD_DIM, ROTATES)
    quantize_block(tl.where(mask, x, 0.0), factor, query_output_ptr + output, query_scale_ptr + scale, mask)


@triton_op("cogvx_kernels::qk_norm_rope_int8_triton", mutates_args=())
def qk_norm_rope_int8(
    query: torch.Tensor,
    key: torch.Tensor,
    query_weight: torch.Tensor | None,
    query_bias: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    cosines: torch.Tensor | None,
    sines: torch.Tensor | None,
    text_length: int,
    eps: float,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`ops.qk_norm_rope_int8` for a head dim up to 64, a power of two; `factor` is the softmax' scale times log2(e)."""
    batch, sequence, heads, head_dim = query.shape

    def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty((batch, heads, *shape), dtype=dtype, device=query.device)

    values = [empty(torch.int8, sequence, head_dim).transpose(1, 2) for _ in range(2)]
    scales = [empty(torch.float32, triton.cdiv(sequence, ROWS)) for _ in range(2)]
    if query.numel() == 0:
        return values[0], scales[0], values[1], scales[1]
    sums = empty(torch.float32, PARTS, head_dim)
    wrap_triton(key_norm_rope_sums_kernel(query.device))[(PARTS, batch * heads)](
        key,
        key_weight,
        key_bias,
        sums,
        cosines,
        sines,
        sequence,
        text_length,
        heads,
        *key.stride()[:3],
        eps,
        HEAD_DIM=head_dim,
        PARTS=PARTS,
    )
    wrap_triton(qk_norm_rope_int8_kernel(query.device))[(triton.cdiv(sequence, ROWS), batch * heads)](
        query,
        query_weight,
        query_bias,
        values[0],
        scales[0],
        key,
        key_weight,
        key_bias,
        values[1],
        scales[1],
        sums,
        cosines,
        sines,
        sequence,
        text_length,
        heads,
        *query.stride()[:3],
        *key.stride()[:3],
        eps,
        factor,
        HEAD_DIM=head_dim,
        PARTS=PARTS,
        ROWS=ROWS,
    )
    return values[0], scales[0], values[1], scales[1]
