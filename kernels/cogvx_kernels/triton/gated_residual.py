"""`reference.gated_residual`: two reads and one write of the stream."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from .rows import NOT_SPECIALIZED, ROWS_CONFIGS, block_of, grid, load_vector, program_rows, strides_of
from .targets import TARGETS, tuned

CONFIGS = dict.fromkeys(TARGETS, ROWS_CONFIGS)  # bound by memory everywhere: `rows` says why these


@triton.jit
def gated_sum(x_ptr, y_ptr, gate_ptr, stride_gate_b, stride_gate_e, rows, mask, expert, columns, dim):
    """`x + gate * y` of a program's rows, in fp32; zeros outside of `mask`."""
    x = tl.load(x_ptr + rows * dim + columns, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + rows * dim + columns, mask=mask, other=0.0).to(tl.float32)
    return x + load_vector(gate_ptr, stride_gate_b, stride_gate_e, expert, columns, dim) * y


@tuned(CONFIGS, key=("dim",))
@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def gated_residual_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    output_ptr,
    sequence,
    dim,
    text_length,
    stride_gate_b,
    stride_gate_e,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows, in_rows, expert = program_rows(sequence, text_length, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    mask = in_rows & (columns < dim)
    output = gated_sum(x_ptr, y_ptr, gate_ptr, stride_gate_b, stride_gate_e, rows, mask, expert, columns, dim)
    tl.store(output_ptr + rows * dim + columns, output.to(output_ptr.dtype.element_ty), mask=mask)


@triton_op("cogvx_kernels::gated_residual_triton", mutates_args=())
def gated_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, text_length: int) -> torch.Tensor:
    """`ops.gated_residual` for contiguous `x` and `y` and a gate whose last axis is contiguous."""
    output = torch.empty_like(x)
    if x.numel() == 0:
        return output
    kernel = gated_residual_kernel(x.device)
    wrap_triton(kernel)[grid(x, text_length)](
        x, y, gate, output, x.shape[1], x.shape[2], text_length, *strides_of(gate), BLOCK=block_of(x.shape[2])
    )
    return output
