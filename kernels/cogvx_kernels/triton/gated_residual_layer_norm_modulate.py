"""`reference.gated_residual_layer_norm_modulate`: two reads and two writes of the stream."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from .gated_residual import gated_sum
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
def gated_residual_layer_norm_modulate_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    weight_ptr,
    bias_ptr,
    shift_ptr,
    scale_ptr,
    residual_ptr,
    output_ptr,
    output_scale_ptr,
    sequence,
    dim,
    text_length,
    stride_gate_b,
    stride_gate_e,
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
    residual = gated_sum(x_ptr, y_ptr, gate_ptr, stride_gate_b, stride_gate_e, rows, mask, expert, columns, dim)
    # The norm is of the stream as it is stored, rounded: the same numbers as two separate operations give.
    residual = residual.to(residual_ptr.dtype.element_ty)
    tl.store(residual_ptr + rows * dim + columns, residual, mask=mask)
    shift = load_vector(shift_ptr, stride_shift_b, stride_shift_e, expert, columns, dim)
    scale = load_vector(scale_ptr, stride_scale_b, stride_scale_e, expert, columns, dim)
    normed = normalize(residual.to(tl.float32), columns, dim, eps)
    output = modulate(normed, weight_ptr, bias_ptr, shift, scale, columns, dim)
    store_rows(output, output_ptr, output_scale_ptr, rows, columns, mask, in_rows, dim)


def _launch(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    residual: torch.Tensor,
    output: torch.Tensor,
    output_scale: torch.Tensor | None,
    text_length: int,
    eps: float,
) -> None:
    if x.numel() == 0:
        return
    kernel = gated_residual_layer_norm_modulate_kernel(x.device)
    wrap_triton(kernel)[grid(x, text_length)](
        x,
        y,
        gate,
        weight,
        bias,
        shift,
        scale,
        residual,
        output,
        output_scale,
        x.shape[1],
        x.shape[2],
        text_length,
        *strides_of(gate),
        *strides_of(shift),
        *strides_of(scale),
        eps,
        BLOCK=block_of(x.shape[2]),
    )


@triton_op("cogvx_kernels::gated_residual_layer_norm_modulate_triton", mutates_args=())
def gated_residual_layer_norm_modulate(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    text_length: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.gated_residual_layer_norm_modulate` for contiguous `x` and `y`, vectors with a contiguous last axis."""
    residual, output = torch.empty_like(x), torch.empty_like(x)
    _launch(x, y, gate, weight, bias, shift, scale, residual, output, None, text_length, eps)
    return residual, output


@triton_op("cogvx_kernels::gated_residual_layer_norm_modulate_quantized_triton", mutates_args=())
def gated_residual_layer_norm_modulate_quantized(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    text_length: int,
    eps: float,
    quantize: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`gated_residual_layer_norm_modulate` with an 8-bit norm and its scales."""
    residual = torch.empty_like(x)
    output = torch.empty(x.shape, dtype=quantize, device=x.device)
    output_scale = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
    _launch(x, y, gate, weight, bias, shift, scale, residual, output, output_scale, text_length, eps)
    return residual, output, output_scale
