"""`reference.qk_norm_rope` and `reference.norm_rope`: one read and one write of Q and K, in one launch for both.

A row is one head of one token; a program takes neighbouring rows, so that heads need no padding. Q and K of the same
rows share what was read of the rotary tables. The channels 2i and 2i + 1, which a rotation mixes, are neighbours in
one thread's registers: taking them apart and together again moves nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op

from .._triton.tuned import EVERYWHERE, launch, launches, tuned

# 32 rows of head dim 64 are 16 numbers a thread and tensor: two 16-byte loads each of Q and K on their way at a time,
# in about 72 registers, which leaves 24 warps or more to a multiprocessor. 16 rows take 40 registers and twice the
# programs. 64 rows took 138 registers for no wider loads: not listed.
_CONFIGS = [triton.Config({"ROWS": rows}, num_warps=4, num_stages=1) for rows in (32, 16)]
CONFIGS = {EVERYWHERE: _CONFIGS}


@triton.jit
def normed_and_rotated(
    x, weight_ptr, bias_ptr, cosines, sines, channels, EPS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTATES: tl.constexpr
):
    """LayerNorm of each row of fp32 `(rows, HEAD_DIM)`, weight and bias or None, and its rotation if ROTATES."""
    x -= tl.sum(x, axis=1, keep_dims=True) / HEAD_DIM
    x *= tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / HEAD_DIM + EPS)
    if weight_ptr is not None:
        x *= tl.load(weight_ptr + channels).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + channels).to(tl.float32)
    if ROTATES:
        even, odd = tl.split(tl.reshape(x, (x.shape[0], HEAD_DIM // 2, 2)))
        cosine_even, cosine_odd = tl.split(tl.reshape(cosines, (x.shape[0], HEAD_DIM // 2, 2)))
        sine_even, sine_odd = tl.split(tl.reshape(sines, (x.shape[0], HEAD_DIM // 2, 2)))
        turned = tl.join(even * cosine_even - odd * sine_even, odd * cosine_odd + even * sine_odd)
        x = tl.reshape(turned, (x.shape[0], HEAD_DIM))
    return x


@triton.jit
def _norm_rope(
    x_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    stride_b,
    stride_s,
    stride_h,
    cosines,
    sines,
    sequence,
    rows,
    channels,
    mask,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTATES: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    starts = sample * stride_b + (rows // HEADS).to(tl.int64) * stride_s + (rows % HEADS) * stride_h
    x = tl.load(x_ptr + starts + channels, mask=mask, other=0.0).to(tl.float32)
    x = normed_and_rotated(x, weight_ptr, bias_ptr, cosines, sines, channels, EPS, HEAD_DIM, ROTATES)
    output = output_ptr + (sample * sequence * HEADS + rows) * HEAD_DIM + channels
    tl.store(output, x.to(output_ptr.dtype.element_ty), mask=mask)


@tuned(CONFIGS, key=("HEADS", "HEAD_DIM"))
@triton.jit(do_not_specialize=["sequence", "text_length"])
def qk_norm_rope_kernel(
    query_ptr,
    query_weight_ptr,
    query_bias_ptr,
    query_output_ptr,
    key_ptr,
    key_weight_ptr,
    key_bias_ptr,
    key_output_ptr,
    cosines_ptr,
    sines_ptr,
    sequence,
    text_length,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    channels = tl.arange(0, HEAD_DIM)[None, :]
    mask = rows < sequence * HEADS
    cosines, sines = None, None
    if cosines_ptr is not None:
        # Text rows turn by no angle.
        video = rows // HEADS - text_length
        angles = video * HEAD_DIM + channels
        turns = mask & (video >= 0)
        cosines = tl.load(cosines_ptr + angles, mask=turns, other=1.0).to(tl.float32)
        sines = tl.load(sines_ptr + angles, mask=turns, other=0.0).to(tl.float32)
    _norm_rope(
        query_ptr,
        query_weight_ptr,
        query_bias_ptr,
        query_output_ptr,
        stride_qb,
        stride_qs,
        stride_qh,
        cosines,
        sines,
        sequence,
        rows,
        channels,
        mask,
        EPS,
        HEADS,
        HEAD_DIM,
        cosines_ptr is not None,
    )
    if key_ptr is not None:
        _norm_rope(
            key_ptr,
            key_weight_ptr,
            key_bias_ptr,
            key_output_ptr,
            stride_kb,
            stride_ks,
            stride_kh,
            cosines,
            sines,
            sequence,
            rows,
            channels,
            mask,
            EPS,
            HEADS,
            HEAD_DIM,
            cosines_ptr is not None,
        )


def _launch(
    query: tuple[torch.Tensor | None, ...],
    key: tuple[torch.Tensor | None, ...],
    tables: tuple[torch.Tensor | None, torch.Tensor | None],
    text_length: int,
    eps: float,
) -> None:
    """Of Q and of K: the tensor, its norm's weight and bias, and the output. K may be nothing but None."""
    x, other = query[0], key[0]
    assert x is not None, "there is no launch without Q"
    if x.numel() == 0:
        return
    batch, sequence, heads, head_dim = x.shape
    launch(
        qk_norm_rope_kernel,
        x.device,
        lambda meta: (triton.cdiv(sequence * heads, meta["ROWS"]), batch),
        *(*query, *key, *tables, sequence, text_length),
        *x.stride()[:3],
        *((0, 0, 0) if other is None else other.stride()[:3]),
        size=batch * sequence * heads,
        EPS=eps,
        HEADS=heads,
        HEAD_DIM=head_dim,
    )


@launches(qk_norm_rope_kernel)
@triton_op("cogvx_kernels::qk_norm_rope_triton", mutates_args=())
def qk_norm_rope(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.qk_norm_rope` for a head dim that is a power of two, and contiguous rotary tables."""
    outputs = (
        torch.empty(query.shape, dtype=query.dtype, device=query.device),
        torch.empty(key.shape, dtype=key.dtype, device=key.device),
    )
    of_query, of_key = (query, query_weight, query_bias, outputs[0]), (key, key_weight, key_bias, outputs[1])
    _launch(of_query, of_key, (cosines, sines), text_length, eps)
    return outputs


@launches(qk_norm_rope_kernel)
@triton_op("cogvx_kernels::norm_rope_triton", mutates_args=())
def norm_rope(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    cosines: torch.Tensor | None,
    sines: torch.Tensor | None,
    text_length: int,
    eps: float,
) -> torch.Tensor:
    """`ops.norm_rope` for a head dim that is a power of two, and contiguous rotary tables."""
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch((x, weight, bias, output), (None, None, None, None), (cosines, sines), text_length, eps)
    return output
