"""`reference.scaled_linear`: a product of 8-bit matrices, with scales, bias, GELU and quantization before it is stored.

A program holds a tile of the output and walks over the columns of `x` and of `weight`, which both have them next to one
another: that is how the tensor cores of every target read 8-bit operands. Programs that run at the same time share a
band of 8 tiles of rows (2 MB of a CogVideoX-2b stream) and walk over the weight's rows with it: both stay in L2.

The sums of int8 are turned into fp32 once, at the end, unless the scales of `x` are by group: then each group's sum is,
and multiplied by its scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from ..reference import GROUP
from .quantize import quantize
from .targets import TARGETS, TunedKernel


def _config(rows: int, columns: int, depth: int, num_warps: int, num_stages: int) -> triton.Config:
    tile = {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": depth}
    return triton.Config(tile, num_warps=num_warps, num_stages=num_stages)


E4M3_TARGETS = ("sm_89", "sm_90", "sm_100", "sm_120")
CONFIGS = {
    (torch.int8, False): dict.fromkeys(TARGETS, [_config(128, 128, 128, 8, 3)]),
    (torch.int8, True): dict.fromkeys(TARGETS, [_config(128, 128, 128, 8, 3)]),
    (torch.float8_e4m3fn, False): dict.fromkeys(E4M3_TARGETS, [_config(128, 128, 128, 8, 3)]),
    (torch.float8_e4m3fn, True): dict.fromkeys(E4M3_TARGETS, [_config(128, 128, 128, 8, 3)]),
}

_BAND = tl.constexpr(8)  # tiles of rows
_LOG2_E = tl.constexpr(1.4426950408889634)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)


@triton.jit
def _tile_of(num_rows, num_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The tile of this program: down a band of rows, then on to the next columns."""
    row_tiles, column_tiles = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_N)
    first = tl.program_id(0) // (_BAND * column_tiles) * _BAND
    height = tl.minimum(row_tiles - first, _BAND)
    within = tl.program_id(0) % (_BAND * column_tiles)
    return first + within % height, within // height


@triton.jit
def _gelu_tanh(x):
    """`x * (1 + tanh(u)) / 2` with `u = sqrt(2 / pi) * (x + 0.044715 * x^3)`, written as `x / (1 + exp(-2 * u))`."""
    u = (x + 0.044715 * x * x * x) * _SQRT_2_OVER_PI
    return x / (1 + tl.exp2(u * (-2 * _LOG2_E)))


@triton.jit(do_not_specialize=["num_rows"])
def scaled_linear_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    bias_ptr,
    output_ptr,
    output_scale_ptr,
    num_rows,
    num_columns,
    depth,
    GROUPED: tl.constexpr,
    GELU: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row_tile, column_tile = _tile_of(num_rows, num_columns, BLOCK_M, BLOCK_N)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)[None, :]
    # Rows and columns past the end read the last one, and are not stored.
    read_rows = tl.minimum(rows, num_rows - 1)
    read_columns = tl.minimum(columns, num_columns - 1)
    # Where a tile's elements are does not change, but where the tile is: one addition for it, none for them.
    x_offsets = (read_rows - row_tile * BLOCK_M)[:, None] * depth + inner
    weight_offsets = (read_columns - column_tile * BLOCK_N)[:, None] * depth + inner
    x_ptr += (row_tile * BLOCK_M).to(tl.int64) * depth
    weight_ptr += (column_tile * BLOCK_N).to(tl.int64) * depth
    scale_tile = x_scale_ptr + read_rows.to(tl.int64) * (tl.cdiv(depth, GROUP) if GROUPED else 1)

    IS_INT8: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    SUM: tl.constexpr = tl.int32 if IS_INT8 else tl.float32
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32 if GROUPED else SUM)
    for start in range(0, depth, BLOCK_K):
        # A thread's columns are the same in all rows that it copies: one comparison. Its own loop for what is left over
        # after whole tiles costs 60 registers a thread.
        mask = inner < depth - start
        x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0)
        weight = tl.load(weight_ptr + weight_offsets, mask=mask, other=0.0)
        if GROUPED:
            scale = tl.load(scale_tile + start // GROUP)[:, None]
            total += tl.dot(x, weight.T, out_dtype=SUM).to(tl.float32) * scale
        else:
            total = tl.dot(x, weight.T, total, out_dtype=SUM)
        x_ptr += BLOCK_K
        weight_ptr += BLOCK_K

    result = total.to(tl.float32)
    if not GROUPED:
        result *= tl.load(scale_tile)[:, None]
    result *= tl.load(weight_scale_ptr + read_columns)[None, :]
    if bias_ptr is not None:
        result += tl.load(bias_ptr + read_columns).to(tl.float32)[None, :]
    if GELU:
        result = _gelu_tanh(result)
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    output_tile = output_ptr + rows[:, None].to(tl.int64) * num_columns + columns[None, :]
    if output_scale_ptr is None:
        tl.store(output_tile, result.to(output_ptr.dtype.element_ty), mask=mask)
    else:
        GROUPS: tl.constexpr = BLOCK_N // GROUP
        result = tl.where((columns < num_columns)[None, :], result, 0.0)
        numbers, scales = quantize(tl.reshape(result, (BLOCK_M, GROUPS, GROUP)), 2, output_ptr.dtype.element_ty)
        tl.store(output_tile, tl.reshape(numbers, (BLOCK_M, BLOCK_N)), mask=mask)
        num_groups = tl.cdiv(num_columns, GROUP)
        groups = column_tile * GROUPS + tl.arange(0, GROUPS)[None, :]
        scale_tile = output_scale_ptr + rows[:, None].to(tl.int64) * num_groups + groups
        in_groups = (rows < num_rows)[:, None] & (groups < num_groups)
        tl.store(scale_tile, tl.reshape(scales, (BLOCK_M, GROUPS)), mask=in_groups)


KERNELS = {
    kind: TunedKernel(scaled_linear_kernel, configs, key=("num_columns", "depth")) for kind, configs in CONFIGS.items()
}


def _launch(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    output: torch.Tensor,
    output_scale: torch.Tensor | None,
) -> None:
    num_columns, depth = weight.shape
    num_rows, grouped = x.numel() // depth, x_scale.ndim == x.ndim
    if num_rows == 0:
        return

    def grid(meta: dict) -> tuple[int]:
        return (triton.cdiv(num_rows, meta["BLOCK_M"]) * triton.cdiv(num_columns, meta["BLOCK_N"]),)

    wrap_triton(KERNELS[x.dtype, grouped](x.device))[grid](
        x,
        x_scale,
        weight,
        weight_scale,
        bias,
        output,
        output_scale,
        num_rows,
        num_columns,
        depth,
        GROUPED=grouped,
        GELU=activation == "gelu_tanh",
        GROUP=GROUP,
    )


@triton_op("cogvx_kernels::scaled_linear_triton", mutates_args=())
def scaled_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`ops.scaled_linear` for contiguous tensors and an `out_dtype` of 16 or 32 bits."""
    output = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype, device=x.device)
    _launch(x, x_scale, weight, weight_scale, bias, activation, output, None)
    return output


@triton_op("cogvx_kernels::scaled_linear_quantized_triton", mutates_args=())
def scaled_linear_quantized(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.scaled_linear` for contiguous tensors and an `out_dtype` of 8 bits."""
    leading, num_columns = x.shape[:-1], weight.shape[0]
    output = torch.empty((*leading, num_columns), dtype=out_dtype, device=x.device)
    scales = torch.empty((*leading, triton.cdiv(num_columns, GROUP)), dtype=torch.float32, device=x.device)
    _launch(x, x_scale, weight, weight_scale, bias, activation, output, scales)
    return output, scales
