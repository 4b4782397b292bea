"""Operations on the autoencoder's channels-last frames."""

from __future__ import annotations

import torch

from .._triton import kernels_of
from ..checks import check_cpu_frames, check_frames, check_impl, check_triton
from . import cpu, reference

gpu, statistics = kernels_of(__name__), kernels_of(__name__, "triton_statistics")


def group_norm_statistics(
    x: torch.Tensor, groups: int, eps: float = 1e-6, impl: str = "torch"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and `1 / sqrt(variance + eps)` of each group of channels, over all frames and pixels, in fp32.

    Args:
        x: `(batch, time, height, width, channels)`.
        groups: divides the channels.
        impl: "torch"; "cpu": bf16 or fp32 with contiguous rows on a CPU; "triton": fp16, bf16 or fp32 on a GPU.

    Returns:
        Two tensors `(batch, groups)`, fp32 (fp64 for fp64 frames).

    Raises:
        ValueError: for shapes that do not fit or an unknown `impl`.
    """
    operation = "group_norm_statistics"
    check_impl(operation, impl)
    check_frames(operation, x=x)
    if groups < 1 or x.shape[4] % groups:
        raise ValueError(f"{operation}: groups={groups} must divide the {x.shape[4]} channels")
    if impl == "cpu":
        check_cpu_frames(operation, x)
        return cpu.group_norm_statistics(x, groups, eps)
    if impl == "triton":
        check_triton(operation, x)
        in_rows = x.stride(3) == x.shape[4] and x.stride(1) == x.shape[2] * x.stride(2)
        return statistics.group_norm_statistics(x if in_rows else x.contiguous(), groups, eps)
    return reference.group_norm_statistics(x, groups, eps)


def group_norm_modulate_silu(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    frames: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    out: torch.Tensor,
    impl: str = "torch",
) -> None:
    """`silu(x * scale + shift)` with tables of a lower resolution, written into `out`, a view into padded frames.

    GroupNorm's statistics and affine, and CogVideoX' spatial modulation, are folded into the tables: norm and
    modulation are one product and one sum.

    Args:
        x: `(batch, time, height, width, channels)`.
        scale, shift: fp32 `(batch, table time, table height, table width, channels)`, contiguous.
        frames, rows, columns: int64 `(time,)`, `(height,)` and `(width,)`, where in the tables each frame, row and
            column is. They are not checked against the tables' sizes: that would be a synchronisation on a GPU.
        out: of the shape and dtype of `x`; may be a view with rows and frames of padding around it, not `x` itself.
        impl: "torch"; "cpu": bf16 or fp32 with contiguous rows on a CPU; "triton": fp16, bf16 or fp32 with contiguous
            channels on a GPU.

    Raises:
        ValueError: for shapes that do not fit or an unknown `impl`.
    """
    operation = "group_norm_modulate_silu"
    check_impl(operation, impl)
    check_frames(operation, x=x, scale=scale, shift=shift)
    if out.shape != x.shape or out.dtype != x.dtype:
        raise ValueError(
            f"{operation}: out must be {tuple(x.shape)} {x.dtype} as x is, got {tuple(out.shape)} {out.dtype}"
        )
    batch, time, height, width, channels = x.shape
    if scale.shape != shift.shape or (scale.shape[0], scale.shape[4]) != (batch, channels):
        raise ValueError(
            f"{operation}: scale and shift must be ({batch}, time, height, width, {channels}), got"
            f" {tuple(scale.shape)} and {tuple(shift.shape)}"
        )
    for name, index, length in (("frames", frames, time), ("rows", rows, height), ("columns", columns, width)):
        if tuple(index.shape) != (length,) or index.dtype != torch.int64:
            raise ValueError(f"{operation}: {name} must be int64 ({length},), got {index.dtype} {tuple(index.shape)}")
    if impl == "torch":
        return reference.group_norm_modulate_silu(x, scale, shift, frames, rows, columns, out)
    if impl == "cpu":
        check_cpu_frames(operation, x, out)
    else:
        check_triton(operation, x, out)
    tables_fit = all(table.is_contiguous() and table.dtype == torch.float32 for table in (scale, shift))
    if not tables_fit or not all(index.is_contiguous() for index in (frames, rows, columns)):
        raise ValueError(f'{operation}: impl="{impl}" takes contiguous fp32 tables and contiguous indices')
    compute = cpu if impl == "cpu" else gpu
    return compute.group_norm_modulate_silu(x, scale, shift, frames, rows, columns, out)
