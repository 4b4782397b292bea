"""The operations of `frames.cpp`, which stand between the convolutions of a VAE, as operations of torch."""

from __future__ import annotations

import ctypes

import torch

from .arguments import array, pointer, sizes, threads
from .build import REORDERED, Source

DTYPES = (torch.bfloat16, torch.float32)
_SOURCE = Source("frames.cpp", REORDERED)
why_not = _SOURCE.why_not


@torch.library.custom_op("cogvx_kernels::group_norm_statistics_cpu", mutates_args=())
def group_norm_statistics(x: torch.Tensor, groups: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.group_norm_statistics`."""
    mean, inverse = (torch.empty(x.shape[0], groups) for _ in range(2))
    _SOURCE.function("group_norm_statistics", x.dtype)(
        pointer(x),
        array(x.stride()[:3]),
        *sizes(*x.shape, groups),
        ctypes.c_float(eps),
        pointer(mean),
        pointer(inverse),
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
    """`ops.group_norm_modulate_silu`."""
    _SOURCE.function("group_norm_modulate_silu", x.dtype)(
        pointer(x),
        array(x.stride()[:3]),
        pointer(scale),
        pointer(shift),
        array(scale.shape[1:4]),
        *(pointer(index) for index in (frames, rows, columns)),
        *sizes(*x.shape),
        pointer(out),
        array(out.stride()[:3]),
        threads(),
    )


@group_norm_statistics.register_fake
def _(x: torch.Tensor, groups: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(x.new_empty((x.shape[0], groups), dtype=torch.float32) for _ in range(2))


@group_norm_modulate_silu.register_fake
def _(*_: torch.Tensor) -> None:
    return None
