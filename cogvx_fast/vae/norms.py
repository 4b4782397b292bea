"""What stands before a convolution, copies and norms: they write where the convolution reads, some rows at a time.

Frames are `(batch, time, height, width, channels)`, their rows contiguous.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from cogvx_kernels import ops
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSpatialNorm3D
from torch import nn

from .chunks import ChunkState

# (the buffer's rows to be written, first row of the frames, the row after the last)
Fill = Callable[[torch.Tensor, int, int], None]


def copied(frames: torch.Tensor) -> Fill:
    """Writes `frames` as they are."""

    def fill(target: torch.Tensor, first: int, last: int) -> None:
        target.copy_(frames[:, :, first:last])

    return fill


def normed(
    frames: torch.Tensor,
    norm: nn.GroupNorm | CogVideoXSpatialNorm3D,
    zq: torch.Tensor | None,
    state: ChunkState,
) -> Fill:
    """Writes SiLU of GroupNorm of `frames`, modulated by the latents where `norm` is the decoder's.

    Args:
        zq: latents `(batch, time, height, width, channels)`, or None for a plain GroupNorm.
    """
    group_norm = norm if zq is None else cast(CogVideoXSpatialNorm3D, norm).norm_layer
    operations = state.plan.operations
    scale, shift = _affine(frames, group_norm, state)
    size = (1, 1, 1) if zq is None else zq.shape[1:4]
    time, height, width = frames.shape[1:4]
    frames_at = _nearest_frames(time, size[0], frames.device)
    columns_at = _nearest(width, size[2], frames.device)

    def fill(target: torch.Tensor, first: int, last: int) -> None:
        # The tables' rows that these rows read, and no others: in slices they would be more than the slice.
        low, high = first * size[1] // height, (last - 1) * size[1] // height + 1
        tables = (scale, shift) if zq is None else _modulated(scale, shift, norm, zq[:, :, low:high])
        rows_at = _nearest(height, size[1], frames.device)[first:last]
        rows_at = rows_at - low if low else rows_at
        ops.group_norm_modulate_silu(
            frames[:, :, first:last], *tables, frames_at, rows_at, columns_at, target, operations
        )

    return fill


def _affine(frames: torch.Tensor, group_norm: nn.GroupNorm, state: ChunkState) -> tuple[torch.Tensor, torch.Tensor]:
    """GroupNorm as one product and one sum a channel, `x * scale + shift`, each `(batch, 1, 1, 1, channels)`."""
    mean, inverse = ops.group_norm_statistics(frames, group_norm.num_groups, group_norm.eps, state.plan.operations)
    if state.band is not None:
        mean, inverse = state.band.statistics(mean, inverse, group_norm.eps)
    each = group_norm.num_channels // group_norm.num_groups
    mean, inverse = (v.repeat_interleave(each, dim=1)[:, None, None, None] for v in (mean, inverse))
    scale = inverse * group_norm.weight.to(mean.dtype)
    return scale, group_norm.bias.to(mean.dtype) - mean * scale


def _modulated(
    scale: torch.Tensor, shift: torch.Tensor, norm: CogVideoXSpatialNorm3D, zq: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with the modulation by latents `(batch, time, height, width, channels)`, at their resolution.

    The modulation's pointwise convolutions commute with the nearest upsampling of their input (Zheng et al.,
    arXiv:2209.09002, as CogVideoX has it: `norm(f) * conv_y(zq) + conv_b(zq)`).
    """
    y, b = (pointwise(zq, layer.conv).to(scale.dtype) for layer in (norm.conv_y, norm.conv_b))
    b.addcmul_(shift, y)
    return y.mul_(scale), b


# A decoder has 37 norms for each chunk, of few sizes. Made for each of them, on a GPU these would be blocking copies.
@functools.lru_cache(maxsize=256)
def _nearest_frames(time: int, low: int, device: torch.device) -> torch.Tensor:
    """Where in `low` frames each of `time` is, by nearest interpolation; of several in odd number the first is
    interpolated apart."""
    if low > 1 and time > 1 and time % 2 == 1:
        return _indices([0, *(1 + i * (low - 1) // (time - 1) for i in range(time - 1))], device)
    return _nearest(time, low, device)


@functools.lru_cache(maxsize=256)
def _nearest(size: int, low: int, device: torch.device) -> torch.Tensor:
    """Where in `low` rows (or columns) each of `size` is, by nearest interpolation."""
    return _indices([i * low // size for i in range(size)], device)


def _indices(values: list[int], device: torch.device) -> torch.Tensor:
    indices = torch.tensor(values, dtype=torch.int64, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # the next to read them may be another stream
    return indices


def pointwise(frames: torch.Tensor, conv: nn.Conv3d) -> torch.Tensor:
    """A convolution of kernel size 1: a matrix product, which has no past and needs no cache."""
    return F.linear(frames, conv.weight.flatten(1), conv.bias)
