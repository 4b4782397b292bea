"""`reference.layer_norm_modulate`: one read and one write of the stream."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from .rows import (
    NOT_SPECIALIZED,
    ROWS_CONFIGS,
    block_of,
    grid,
    load_vector,
    modulate,
    normalize,
    program_rows,
    store_rows,
    strides_of,
)
from .targets import TARGETS, tuned

CONFIGS = dict.fromkeys(TARGETS, ROWS_CONFIGS)  # bound by memory everywhere: `rows` says why these


@tuned(CONFIGS, key=("dim",))
@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def layer_norm_modulate_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    shift_ptr,
    scale_ptr,
    output_ptr,
    output_scale_ptr,
    sequence,
    dim,
    text_length,
    stride_shift_b,
    stride_shift_e,
    stride_scale_b,
    stride_scale_e,
    eps,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows, in_rows, expert = program_rows(sequence, text_length, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    mask = in_rows & (columns < dim)
    x = tl.load(x_ptr + rows * dim + columns, mask=mask, other=0.0).to(tl.float32)
    shift = load_vector(shift_ptr, stride_shift_b, stride_shift_e, expert, columns, dim)
    scale = load_vector(scale_ptr, stride_scale_b, stride_scale_e, expert, columns, dim)
    output = modulate(normalize(x, columns, dim, eps), weight_ptr, bias_ptr, shift, scale, columns, dim)
    store_rows(output, output_ptr, output_scale_ptr, rows, columns, mask, in_rows, dim)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    output: torch.Tensor,
    output_scale: torch.Tensor | None,
    text_length: int,
    eps: float,
) -> None:
    if x.numel() == 0:
        return
    kernel = layer_norm_modulate_kernel(x.device)
    wrap_triton(kernel)[grid(x, text_length)](
        x,
        weight,
        bias,
        shift,
        scale,
        output,
        output_scale,
        x.shape[1],
        x.shape[2],
        text_length,
        *strides_of(shift),
        *strides_of(scale),
        eps,
        BLOCK=block_of(x.shape[2]),
    )


@triton_op("cogvx_kernels::layer_norm_modulate_triton", mutates_args=())
def layer_norm_modulate(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    text_length: int,
    eps: float,
) -> torch.Tensor:
    """`ops.layer_norm_modulate` for a contiguous `x` and vectors whose last axis is contiguous."""
    output = torch.empty_like(x)
    _launch(x, weight, bias, shift, scale, output, None, text_length, eps)
    return output


@triton_op("cogvx_kernels::layer_norm_modulate_quantized_triton", mutates_args=())
def layer_norm_modulate_quantized(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    text_length: int,
    eps: float,
    quantize: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`layer_norm_modulate` with 8-bit output and its scales."""
    output = torch.empty(x.shape, dtype=quantize, device=x.device)
    output_scale = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
    _launch(x, weight, bias, shift, scale, output, output_scale, text_length, eps)
    return output, output_scale
