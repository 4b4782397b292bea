"""`reference.qk_norm_rope_int8`: Q and K of the packed projection to what `int8_attention` multiplies, in one launch.

With 2 bytes an element of the stream as the unit it reads Q and K (2) and writes them in 8 bits (1): 3, where
`qk_norm_rope` in 16 bits moves 4, and `qk_norm_rope` and `quantize_qk` one after the other 7.

A program has a block of one head, which shares a scale; all heads of a token turn by the same angles, read from L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op

from .._triton.tuned import EVERYWHERE, launch, launches, tuned
from ..qk_norm_rope.triton import normed_and_rotated
from .reference import SAMPLES
from .triton_blocks import ROWS, load_sample, outputs_of, quantize_block, sample_mean, sample_of

# A block is 128 rows: 32 numbers a thread each of K, cosines and sines in 8 warps, on their way together. 16 warps have
# more of them on their way, in 92 registers instead of 163: one program either way.
_CONFIGS = [triton.Config({}, num_warps=num_warps, num_stages=1) for num_warps in (8, 16)]
CONFIGS = {EVERYWHERE: _CONFIGS}


@triton.jit
def _angles(cosines_ptr, sines_ptr, rows, channels, mask, text_length, HEAD_DIM: tl.constexpr):
    """Cosines and sines of a tile of rows; text rows turn by no angle."""
    video = rows - text_length
    turns = mask & (video >= 0)
    cosines = tl.load(cosines_ptr + video * HEAD_DIM + channels, mask=turns, other=1.0).to(tl.float32)
    sines = tl.load(sines_ptr + video * HEAD_DIM + channels, mask=turns, other=0.0).to(tl.float32)
    return cosines, sines


@tuned(CONFIGS, key=("HEAD_DIM",))
@triton.jit(do_not_specialize=["sequence", "text_length", "sample_step", "heads"])
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
    sample_ptr,
    cosines_ptr,
    sines_ptr,
    sequence,
    text_length,
    sample_step,
    heads,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    EPS: tl.constexpr,
    FACTOR: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
):
    sample = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    channels = tl.arange(0, HEAD_DIM)[None, :]
    ROTATES: tl.constexpr = cosines_ptr is not None
    cosines, sines = None, None

    sample_ptr += sample * stride_kb + head * stride_kh
    x, rows, mask = load_sample(sample_ptr, stride_ks, sequence, sample_step, channels, SAMPLES)
    if ROTATES:
        cosines, sines = _angles(cosines_ptr, sines_ptr, rows, channels, mask, text_length, HEAD_DIM)
    x = normed_and_rotated(x, key_weight_ptr, key_bias_ptr, cosines, sines, channels, EPS, HEAD_DIM, ROTATES)
    mean = sample_mean(x, sequence, sample_step, mask)

    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    mask = rows < sequence
    output = (tl.program_id(1).to(tl.int64) * sequence + rows) * HEAD_DIM + channels
    scale = tl.program_id(1) * tl.cdiv(sequence, ROWS) + tl.program_id(0)
    if ROTATES:
        cosines, sines = _angles(cosines_ptr, sines_ptr, rows, channels, mask, text_length, HEAD_DIM)
    tile = key_ptr + sample * stride_kb + head * stride_kh + rows.to(tl.int64) * stride_ks + channels
    x = tl.load(tile, mask=mask, other=0.0).to(tl.float32)
    x = normed_and_rotated(x, key_weight_ptr, key_bias_ptr, cosines, sines, channels, EPS, HEAD_DIM, ROTATES)
    quantize_block(tl.where(mask, x - mean, 0.0), 1.0, key_output_ptr + output, key_scale_ptr + scale, mask)

    tile = query_ptr + sample * stride_qb + head * stride_qh + rows.to(tl.int64) * stride_qs + channels
    x = tl.load(tile, mask=mask, other=0.0).to(tl.float32)
    x = normed_and_rotated(x, query_weight_ptr, query_bias_ptr, cosines, sines, channels, EPS, HEAD_DIM, ROTATES)
    quantize_block(tl.where(mask, x, 0.0), FACTOR, query_output_ptr + output, query_scale_ptr + scale, mask)


@launches(qk_norm_rope_int8_kernel)
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
    values, scales = zip(outputs_of(query), outputs_of(key), strict=True)
    if query.numel() == 0:
        return values[0], scales[0], values[1], scales[1]
    sample, step = sample_of(key)
    launch(
        qk_norm_rope_int8_kernel,
        query.device,
        (triton.cdiv(sequence, ROWS), batch * heads),
        *(query, query_weight, query_bias, values[0], scales[0]),
        *(key, key_weight, key_bias, values[1], scales[1], sample),
        *(cosines, sines),
        *(sequence, text_length, step, heads),
        *query.stride()[:3],
        *key.stride()[:3],
        size=sequence,
        EPS=eps,
        FACTOR=factor,
        HEAD_DIM=head_dim,
        SAMPLES=SAMPLES,
        ROWS=ROWS,
    )
    return values[0], scales[0], values[1], scales[1]
