"""The layers of the autoencoder on channels-last frames, each made of a reference layer's own weights.

Frames are `(batch, time, height, width, channels)` and contiguous. A convolution reads them from a buffer that
has its causal frames in front and a row of zeros above and below; what comes before the convolution writes there,
a number of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from cogvx_kernels import ops
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d, CogVideoXSpatialNorm3D
from torch import nn

# (the buffer's rows to be written, first row of the frames, the row after the last)
Fill = Callable[[torch.Tensor, int, int], None]


@dataclass
class Clip:
    """What the chunks of one video share while they go through the layers.

    Attributes:
        impl: of the operations between the convolutions, as `cogvx_kernels.ops` names it.
        rows: how many rows of a convolution are computed at a time, all of them where it is not named.
        frames_at_once: how many frames are resampled at a time, likewise.
        caches: of each causal convolution the last frames that it read.
        is_last: whether no chunk follows this one: nothing is cached then.
    """

    impl: str = "torch"
    rows: Mapping[nn.Module, int] = field(default_factory=dict)
    frames_at_once: Mapping[nn.Module, int] = field(default_factory=dict)
    caches: dict[nn.Module, torch.Tensor] = field(default_factory=dict)
    is_last: bool = False


def causal_conv(
    layer: CogVideoXCausalConv3d, fill: Fill, like: torch.Tensor, clip: Clip, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """The causal convolution of what `fill` writes; new frames, or `residual` with them added in place.

    Args:
        like: frames of the shape that `fill` writes.
    """
    batch, time, height, width, channels = like.shape
    kernel, conv = layer.time_kernel_size, layer.conv
    rows = min(clip.rows.get(layer, height), height)
    old = clip.caches.pop(layer, None)
    new = None
    if not clip.is_last:
        # With all rows at once, each old frame is read before its place is written.
        new = old if old is not None else like.new_empty(batch, kernel - 1, height, width, channels)
        clip.caches[layer] = new
    whole = residual
    for first in range(0, height, rows):
        last = min(first + rows, height)
        above, below = max(first - 1, 0), min(last + 1, height)
        buffer = like.new_empty(batch, kernel - 1 + time, last - first + 2, width, channels)
        inner = buffer[:, :, above - (first - 1) : below - (first - 1)]
        if first == 0:
            buffer[:, :, 0] = 0
        if last == height:
            buffer[:, :, -1] = 0
        fill(inner[:, kernel - 1 :], above, below)
        inner[:, : kernel - 1] = inner[:, kernel - 1 : kernel] if old is None else old[:, :, above:below]
        if new is not None:
            # One row behind: the next rows still read the old frames of the one above them.
            done = height if last == height else last - 1
            new[:, :, above:done] = inner[:, time : time + kernel - 1, : done - above]
        part = _conv3d(buffer, conv)
        del buffer, inner
        if residual is not None:
            residual[:, :, first:last] += part
        elif rows == height:
            whole = part
        else:
            if whole is None:
                whole = like.new_empty(batch, time, height, width, conv.out_channels)
            whole[:, :, first:last] = part
        del part
    return whole


def _conv3d(buffer: torch.Tensor, conv: nn.Conv3d) -> torch.Tensor:
    """A stride-1 convolution of `(batch, time, height, width, channels)` whose time and height are padded already."""
    output = F.conv3d(buffer.permute(0, 4, 1, 2, 3), conv.weight, conv.bias, padding=(0, 0, conv.padding[2]))
    return output.permute(0, 2, 3, 4, 1).contiguous()


def copied(frames: torch.Tensor) -> Fill:
    """Writes `frames` as they are."""

    def fill(target: torch.Tensor, first: int, last: int) -> None:
        target.copy_(frames[:, :, first:last])

    return fill


def normed(
    frames: torch.Tensor, norm: nn.GroupNorm | CogVideoXSpatialNorm3D, zq: torch.Tensor | None, impl: str
) -> Fill:
    """Writes SiLU of GroupNorm of `frames`, modulated by the latents where `norm` is the decoder's.

    Args:
        zq: latents `(batch, time, height, width, channels)`, or None for a plain GroupNorm.
    """
    scale, shift = _tables(frames, norm, zq, impl)
    frames_at, rows_at, columns_at = _nearest(frames.shape[1:4], scale.shape[1:4], frames.device)

    def fill(target: torch.Tensor, first: int, last: int) -> None:
        ops.group_norm_modulate_silu(
            frames[:, :, first:last], scale, shift, frames_at, rows_at[first:last], columns_at, target, impl
        )

    return fill


def _tables(
    frames: torch.Tensor, norm: nn.GroupNorm | CogVideoXSpatialNorm3D, zq: torch.Tensor | None, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm and modulation as one product and one sum, `x * scale + shift`, at the latents' resolution.

    The modulation's pointwise convolutions commute with the nearest upsampling of their input (Zheng et al.,
    arXiv:2209.09002, as CogVideoX has it: `norm(f) * conv_y(zq) + conv_b(zq)`), GroupNorm's affine and its
    statistics fold into them.
    """
    group_norm = norm if zq is None else norm.norm_layer
    mean, inverse = ops.group_norm_statistics(frames, group_norm.num_groups, group_norm.eps, impl)
    each = group_norm.num_channels // group_norm.num_groups
    mean, inverse = (v.repeat_interleave(each, dim=1)[:, None, None, None] for v in (mean, inverse))
    weight, bias = group_norm.weight.to(mean.dtype), group_norm.bias.to(mean.dtype)
    scale = inverse * weight
    shift = bias - mean * scale
    if zq is not None:
        y, b = (pointwise(zq, layer.conv).to(mean.dtype) for layer in (norm.conv_y, norm.conv_b))
        scale, shift = scale * y, torch.addcmul(b, shift, y)
    return scale, shift


def _nearest(
    size: torch.Size, table: torch.Size, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where in `table` each frame, row and column of `size` is, by nearest interpolation; of several frames in odd
    number the first is interpolated apart."""
    time, low = size[0], table[0]
    if low > 1 and time > 1 and time % 2 == 1:
        frames = [0, *(1 + i * (low - 1) // (time - 1) for i in range(time - 1))]
    else:
        frames = [i * low // time for i in range(time)]
    rows, columns = (torch.arange(n, device=device) * m // n for n, m in zip(size[1:], table[1:], strict=True))
    return torch.tensor(frames, device=device), rows, columns


def pointwise(frames: torch.Tensor, conv: nn.Conv3d) -> torch.Tensor:
    """A convolution of kernel size 1: a matrix product, which has no past and needs no cache."""
    return F.linear(frames, conv.weight.flatten(1), conv.bias)
