"""Expert AdaLN and gated residuals in one pass over the joint stream each.

`layer_norm_modulate` is one read and one write of the stream, `gated_residual` two reads and one write, both together
two of each. Rows, vectors and their arithmetic are in `_triton.rows`. Outputs are arguments, so that one operation
serves those in the stream's dtype and those in 8 bits with scales.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op

from .._triton.rows import (
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
from .._triton.tuned import EVERYWHERE, launch, launches, tuned

CONFIGS = {EVERYWHERE: ROWS_CONFIGS}  # bound by memory everywhere: `rows` says why these


@triton.jit
def gated_sum(x_ptr, y_ptr, gate_ptr, stride_gate_b, stride_gate_e, rows, mask, expert, columns, dim):
    """`x + gate * y` of a program's rows, in fp32; zeros outside of `mask`."""
    x = tl.load(x_ptr + rows * dim + columns, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + rows * dim + columns, mask=mask, other=0.0).to(tl.float32)
    return x + load_vector(gate_ptr, stride_gate_b, stride_gate_e, expert, columns, dim) * y


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
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows, in_rows, expert = program_rows(sequence, text_length, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    mask = in_rows & (columns < dim)
    x = tl.load(x_ptr + rows * dim + columns, mask=mask, other=0.0).to(tl.float32)
    shift = load_vector(shift_ptr, stride_shift_b, stride_shift_e, expert, columns, dim)
    scale = load_vector(scale_ptr, stride_scale_b, stride_scale_e, expert, columns, dim)
    output = modulate(normalize(x, columns, dim, EPS), weight_ptr, bias_ptr, shift, scale, columns, dim)
    store_rows(output, output_ptr, output_scale_ptr, rows, columns, mask, in_rows, dim)


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
    EPS: tl.constexpr,
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
    normed = normalize(residual.to(tl.float32), columns, dim, EPS)
    output = modulate(normed, weight_ptr, bias_ptr, shift, scale, columns, dim)
    store_rows(output, output_ptr, output_scale_ptr, rows, columns, mask, in_rows, dim)


def _launch(kernel, x: torch.Tensor, text_length: int, tensors: tuple, vectors: tuple[torch.Tensor, ...], **meta):
    """`tensors` of the kernel in its order, then the size of the stream `x`, then the strides of `vectors`."""
    if x.numel() == 0:
        return
    _, sequence, dim = x.shape
    strides = [stride for vector in vectors for stride in strides_of(vector)]
    arguments = (*tensors, sequence, dim, text_length, *strides)
    launch(kernel, x.device, grid(x, text_length), *arguments, size=x.numel() // dim, BLOCK=block_of(dim), **meta)


@launches(layer_norm_modulate_kernel)
@triton_op("cogvx_kernels::layer_norm_modulate_triton", mutates_args=("output", "output_scale"))
def layer_norm_modulate(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    text_length: int,
    eps: float,
    output: torch.Tensor,
    output_scale: torch.Tensor | None,
) -> None:
    """`ops.layer_norm_modulate` for a contiguous `x` and vectors whose last axis is contiguous.

    Args:
        output, output_scale: what is written: of the dtype of `x` and None, or 8 bits and a scale for each row.
    """
    tensors = (x, weight, bias, shift, scale, output, output_scale)
    _launch(layer_norm_modulate_kernel, x, text_length, tensors, (shift, scale), EPS=eps)


@launches(gated_residual_kernel)
@triton_op("cogvx_kernels::gated_residual_triton", mutates_args=("output",))
def gated_residual(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, text_length: int, output: torch.Tensor
) -> None:
    """`ops.gated_residual` for contiguous `x` and `y` and a gate whose last axis is contiguous."""
    _launch(gated_residual_kernel, x, text_length, (x, y, gate, output), (gate,))


@launches(gated_residual_layer_norm_modulate_kernel)
@triton_op(
    "cogvx_kernels::gated_residual_layer_norm_modulate_triton", mutates_args=("residual", "output", "output_scale")
)
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
    residual: torch.Tensor,
    output: torch.Tensor,
    output_scale: torch.Tensor | None,
) -> None:
    """`ops.gated_residual_layer_norm_modulate` for contiguous `x` and `y`, vectors with a contiguous last axis; what is
    written as in `layer_norm_modulate`."""
    tensors = (x, y, gate, weight, bias, shift, scale, residual, output, output_scale)
    _launch(gated_residual_layer_norm_modulate_kernel, x, text_length, tensors, (gate, shift, scale), EPS=eps)
