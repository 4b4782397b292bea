"""`reference.quantize_rows`: one read of the rows, one write of them in 8 bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op

from .._triton.quantize import quantize
from .._triton.rows import ROWS_CONFIGS, block_of
from .._triton.tuned import EVERYWHERE, launch, launches, tuned
from ..precision import GROUP

CONFIGS = {EVERYWHERE: ROWS_CONFIGS}  # bound by memory everywhere: `rows` says why these


@tuned(CONFIGS, key=("dim",))
@triton.jit(do_not_specialize=["num_rows"])
def quantize_rows_kernel(
    x_ptr,
    output_ptr,
    output_scale_ptr,
    num_rows,
    dim,
    num_groups,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None, None]
    groups = tl.arange(0, GROUPS)[None, :, None]
    columns = groups * GROUP + tl.arange(0, GROUP)[None, None, :]
    mask = (rows < num_rows) & (columns < dim)
    x = tl.load(x_ptr + rows * dim + columns, mask=mask, other=0.0).to(tl.float32)
    numbers, scales = quantize(x, 2, output_ptr.dtype.element_ty)
    tl.store(output_ptr + rows * dim + columns, numbers, mask=mask)
    tl.store(output_scale_ptr + rows * num_groups + groups, scales, mask=(rows < num_rows) & (groups < num_groups))


@launches(quantize_rows_kernel)
@triton_op("cogvx_kernels::quantize_rows_triton", mutates_args=())
def quantize_rows(x: torch.Tensor, dtype: torch.dtype, grouped: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.quantize_rows` for a contiguous `x`."""
    dim = x.shape[-1]
    num_groups = triton.cdiv(dim, GROUP) if grouped else 1
    output = torch.empty(x.shape, dtype=dtype, device=x.device)
    leading = x.shape[:-1]
    scales = torch.empty((*leading, num_groups) if grouped else leading, dtype=torch.float32, device=x.device)
    if x.numel() > 0:
        num_rows = x.numel() // dim
        group = GROUP if grouped else block_of(dim)
        launch(
            quantize_rows_kernel,
            x.device,
            lambda meta: (triton.cdiv(num_rows, meta["ROWS"]),),
            *(x, output, scales, num_rows, dim, num_groups),
            size=num_rows,
            GROUP=group,
            GROUPS=block_of(num_groups),
        )
    return output, scales
