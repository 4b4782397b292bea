"""The operations of `group_norm.cpp`, which stand between the convolutions of a VAE, as operations of torch."""

from __future__ import annotations

import ctypes

import torch

from .._cpp.arguments import array, operand, sizes, threads
from .._cpp.build import REORDERED, Source
from ..checks import CPU_DTYPES

_SOURCE = Source.beside(__file__, "group_norm.cpp", REORDERED)
why_unavailable = _SOURCE.why_unavailable


@torch.library.custom_op("cogvx_kernels::group_norm_statistics_cpu", mutates_args=())
def group_norm_statistics(x: torch.Tensor, groups: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.group_norm_statistics`."""
    size = (x.shape[0], groups)
    mean, inverse = (torch.empty(size, dtype=torch.float32, device="cpu") for _ in range(2))
    frames = operand("x", x, CPU_DTYPES, x.shape, strided=3)
    _SOURCE.function("group_norm_statistics", x.dtype)(
        frames,
        array(x.stride()[:3]),
        *sizes(*x.shape, groups),
        ctypes.c_float(eps),
        operand("mean", mean, torch.float32, size),
        operand("inverse", inverse, torch.float32, size),
        threads(),
    )
    return mean, inverse


@torch.library.custom_op("cogvx_kernels::group_norm_modulate_silu_cpu", mutates_args=("out",))
def group_norm_modulate_silu(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    frames: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """`ops.group_norm_modulate_silu`.

    Raises:
        IndexError: for an index that its table does not have.
    """
    batch, time, height, width, channels = x.shape
    table = (batch, *scale.shape[1:4], channels)
    source = operand("x", x, CPU_DTYPES, x.shape, strided=3)
    outside = _SOURCE.function("group_norm_modulate_silu", x.dtype)(
        source,
        array(x.stride()[:3]),
        operand("scale", scale, torch.float32, table),
        operand("shift", shift, torch.float32, table),
        array(scale.shape[1:4]),
        operand("frames", frames, torch.int64, (time,)),
        operand("rows", rows, torch.int64, (height,)),
        operand("columns", columns, torch.int64, (width,)),
        *sizes(*x.shape),
        operand("out", out, x.dtype, x.shape, strided=3),
        array(out.stride()[:3]),
        threads(),
    )
    if outside:
        raise IndexError(f"group_norm_modulate_silu: an index lies outside of its table, {tuple(scale.shape[1:4])}")


@group_norm_statistics.register_fake
def _(x: torch.Tensor, groups: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    mean = x.new_empty((x.shape[0], groups), dtype=torch.float32)
    return mean, torch.empty_like(mean)


@group_norm_modulate_silu.register_fake
def _(*_: torch.Tensor) -> None:
    return None
