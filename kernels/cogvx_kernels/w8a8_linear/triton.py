"""`reference.scaled_linear`: a product of 8-bit matrices, with scales, bias, GELU and quantization before it is stored.

A program holds a tile of the output and walks over the columns of `x` and of `weight`, which both have them next to one
another: that is how the tensor cores of every target read 8-bit operands. Programs that run at the same time share a
band of 8 tiles of rows (2 MB of a CogVideoX-2b stream) and walk over the weight's rows with it: both stay in L2.

The sums of int8 are turned into fp32 once, at the end, unless the scales of `x` are by group: then each group's sum is,
and multiplied by its scale. Those of e4m3 are the tensor cores' own for the columns of one tile, 128 at most, and are
then added in fp32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch.library import triton_op

from .._triton.quantize import quantize
from .._triton.tuned import EVERYWHERE, TunedKernel, launch, launches
from ..precision import GROUP


def _config(
    rows: int,
    columns: int,
    depth: int,
    num_warps: int,
    num_stages: int,
    by_bits: bool = False,
    sums_in_fp32: bool = False,
) -> triton.Config:
    tile = {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": depth, "BY_BITS": by_bits, "SUMS_IN_FP32": sums_in_fp32}
    return triton.Config(tile, num_warps=num_warps, num_stages=num_stages)


# Warps that multiply from registers read 64 x 64 of the output from shared memory in half the time of the products (the
# A100's tensor cores; a quarter on the others), so 4 of them have 128 x 128, at 255 registers and without a spill. Two
# such programs fit a multiprocessor: one multiplies while the other does GELU and stores. 8 warps with a tile twice as
# large read a quarter less from L2.
_AMPERE = [_config(128, 128, 128, 4, 3), _config(128, 256, 128, 8, 3), _config(256, 128, 128, 8, 3)]
# 99 KiB of shared memory a program, 100 a multiprocessor: tiles half as deep.
_ADA = [_config(128, 128, 64, 4, 4), _config(128, 256, 64, 8, 4), _config(256, 128, 64, 8, 4)]
_BLACKWELL_RTX = [_config(128, 128, 64, 4, 4), _config(128, 128, 64, 8, 4), _config(128, 128, 128, 8, 3)]
# wgmma reads shared memory itself. It is L2 that has to be spared: 128 x 128 would ask of it 64 bytes a clock of every
# multiprocessor, 128 x 256 48. The third is for GELU: two programs, one of which multiplies.
_HOPPER = [_config(128, 256, 128, 8, 4), _config(256, 128, 128, 8, 4), _config(128, 128, 128, 4, 3)]
# triton has no tcgen05 for int8 and multiplies as on the A100. e4m3 sums stay in tensor memory; read back, those of
# more than 128 x 128 for 8 warps are spilled.
_BLACKWELL_INT8 = [_config(128, 128, 128, 4, 4), _config(128, 256, 128, 8, 4)]
_BLACKWELL_E4M3 = [_config(128, 128, 128, 8, stages, sums_in_fp32=True) for stages in (4, 3)]
# 64 KiB of shared memory.
_CDNA = [_config(128, 128, 128, 8, 2), _config(256, 128, 64, 8, 2), _config(128, 128, 64, 4, 2)]
# With scales by group there are two sums for each element, the group's and the total: half the tile for each warp.
# The A100 converts int32 to fp32 at 16 a clock (I2F), as long for a group as its products take; by bits it is one
# addition, at four times the rate. All newer GPUs do it at 64 a clock (I2FP). With wgmma, bits would cost a move more.
_GROUPED = [_config(128, 128, 128, 8, 3), _config(64, 128, 128, 4, 3)]
_AMPERE_GROUPED = [_config(128, 128, 128, 8, 3, by_bits=True), _config(64, 128, 128, 4, 3, by_bits=True)]
_HOPPER_GROUPED = [_config(128, 128, 128, 8, 4), _config(128, 128, 128, 8, 3)]
_CDNA_GROUPED = [_config(128, 128, 128, 8, 2), _config(128, 128, 64, 4, 1)]
# The tensor cores of 8.9 and 9.0 sum e4m3 products in 22 bits or fewer (SageAttention2, arXiv:2411.10958, 3.4;
# DeepSeek-V3, arXiv:2412.19437, 3.3.2), of 12.0 nothing is published: a tile of them, and then into fp32. That takes a
# second sum, as groups do. Those of 10.0 sum in fp32.
_E4M3 = {"rtx": _GROUPED, "hopper": _HOPPER_GROUPED, "blackwell": _BLACKWELL_E4M3, "rtx-blackwell": _GROUPED}
# By dtype and whether the scales of `x` are by group.
CONFIGS = {
    (torch.int8, False): {
        "a100": _AMPERE,
        "rtx": _ADA,
        "hopper": _HOPPER,
        "blackwell": _BLACKWELL_INT8,
        "rtx-blackwell": _BLACKWELL_RTX,
        "cdna": _CDNA,
    },
    (torch.int8, True): {
        "a100": _AMPERE_GROUPED,
        "hopper": _HOPPER_GROUPED,
        "cdna": _CDNA_GROUPED,
        EVERYWHERE: _GROUPED,
    },
    (torch.float8_e4m3fn, False): _E4M3,
    (torch.float8_e4m3fn, True): _E4M3,
}
# For sm_80 and sm_86 triton does not compile e4m3 (the launch's dtypes say so for the family "rtx").
WITHOUT = {
    torch.float8_e4m3fn: {
        "a100": "its tensor cores multiply no e4m3",
        "cdna": "triton turns e4m3 into fp16 there, for products at the rate of fp16",
    }
}

_BAND = tl.constexpr(8)  # tiles of rows
_BITS_OF_1_5_TIMES_2_TO_23 = tl.constexpr(0x4B400000)
_1_5_TIMES_2_TO_23 = tl.constexpr(12582912.0)
# -2 * log2(e) * sqrt(2 / pi), and that times 0.044715: GELU's exponential is one of 2.
_GELU_LINEAR = tl.constexpr(-2 * math.log2(math.e) * math.sqrt(2 / math.pi))
_GELU_CUBIC = tl.constexpr(-2 * math.log2(math.e) * math.sqrt(2 / math.pi) * 0.044715)


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
    return x / (1 + tl.exp2(x * (x * x * _GELU_CUBIC + _GELU_LINEAR)))


@triton.jit
def _float_of_sum(total, BY_BITS: tl.constexpr):
    """The fp32 of int32 sums; BY_BITS: below 2^22, as of 128 (or 256) products of int8, and without a conversion.

    Added to the bits of 1.5 * 2^23, such a number is in the mantissa of a float that is larger by 1.5 * 2^23. triton
    starts the sum there, and adds nothing.
    """
    if BY_BITS:
        result = (total + _BITS_OF_1_5_TIMES_2_TO_23).to(tl.float32, bitcast=True) - _1_5_TIMES_2_TO_23
    else:
        result = total.to(tl.float32)
    return result


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
    BY_BITS: tl.constexpr,
    SUMS_IN_FP32: tl.constexpr,
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
            total += _float_of_sum(tl.dot(x, weight.T, out_dtype=SUM), BY_BITS) * scale
        elif IS_INT8:
            total = tl.dot(x, weight.T, total, out_dtype=SUM)
        elif SUMS_IN_FP32:
            total = tl.dot(x, weight.T, total)
        else:
            # Said to be imprecise beyond a tile, the product stays one of its own, which is added in fp32.
            total += tl.dot(x, weight.T, max_num_imprecise_acc=BLOCK_K)
        x_ptr += BLOCK_K
        weight_ptr += BLOCK_K

    # By bits only sums of few products can be converted; here each has hundreds and is converted once.
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
    (dtype, grouped): TunedKernel(scaled_linear_kernel, configs, ("num_columns", "depth"), WITHOUT.get(dtype))
    for (dtype, grouped), configs in CONFIGS.items()
}


@launches(scaled_linear_kernel)
@triton_op("cogvx_kernels::scaled_linear_triton", mutates_args=("output", "output_scale"))
def scaled_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    output: torch.Tensor,
    output_scale: torch.Tensor | None,
) -> None:
    """`ops.scaled_linear` for contiguous tensors.

    Args:
        output, output_scale: what is written: of 16 or 32 bits and None, or 8 bits and a scale for each group.
    """
    num_columns, depth = weight.shape
    num_rows, grouped = x.numel() // depth, x_scale.ndim == x.ndim
    if num_rows == 0:
        return

    def grid(meta: dict) -> tuple[int]:
        return (triton.cdiv(num_rows, meta["BLOCK_M"]) * triton.cdiv(num_columns, meta["BLOCK_N"]),)

    tensors = (x, x_scale, weight, weight_scale, bias, output, output_scale)
    launch(
        KERNELS[x.dtype, grouped],
        x.device,
        grid,
        *tensors,
        num_rows,
        num_columns,
        depth,
        size=num_rows,
        GROUPED=grouped,
        GELU=activation == "gelu_tanh",
        GROUP=GROUP,
    )
