"""The layers of the autoencoder on channels-last frames, each made of a reference layer's own weights.

Frames are `(batch, time, height, width, channels)` and contiguous. A convolution reads them from a buffer that
has its causal frames in front and a row of zeros above and below; what comes before the convolution writes there,
a number of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from cogvx_kernels import ops
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d, CogVideoXSpatialNorm3D
from torch import nn

from .history import KeptFrames, keep

# (the buffer's rows to be written, first row of the frames, the row after the last)
Fill = Callable[[torch.Tensor, int, int], None]


@dataclass
class Clip:
    """What the chunks of one video share while they go through the layers.

    Attributes:
        impl: of the operations between the convolutions, as `cogvx_kernels.ops` names it.
        rows: how many rows of a convolution are computed at a time, all of them where it is not named.
        frames_at_once: how many frames are resampled at a time, likewise.
        elsewhere: layers whose waiting frames (a convolution's last ones, an upsampling's input, the pixels) lie
            outside of the device's memory, see `history`.
        caches: of each causal convolution the last frames that it read.
        is_last: whether no chunk follows this one: nothing is cached then.
    """

    impl: str = "torch"
    rows: Mapping[nn.Module, int] = field(default_factory=dict)
    frames_at_once: Mapping[nn.Module, int] = field(default_factory=dict)
    elsewhere: Container[nn.Module] = frozenset()
    caches: dict[nn.Module, KeptFrames] = field(default_factory=dict)
    is_last: bool = False

    def slices(self, layer: CogVideoXCausalConv3d, height: int) -> bool:
        """Whether a convolution of frames of `height` is computed some rows at a time."""
        return self.rows.get(layer, height) < height


def causal_conv(
    layer: CogVideoXCausalConv3d, fill: Fill, like: torch.Tensor, clip: Clip, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The causal convolution of what `fill` writes: new frames, or `out` with them in it.

    Args:
        like: frames of the shape that `fill` writes.
    """
    for first, last, rows in causal_conv_rows(layer, fill, like, clip):
        if out is None and rows.shape[2] == like.shape[2]:
            return rows
        if out is None:
            out = like.new_empty(*like.shape[:4], layer.conv.out_channels)
        out[:, :, first:last] = rows
        del rows
    return out


def add_causal_conv(
    layer: CogVideoXCausalConv3d, fill: Fill, like: torch.Tensor, clip: Clip, residual: torch.Tensor
) -> None:
    """Adds the causal convolution of what `fill` writes, which has the shape of `like`, to `residual`."""
    for first, last, rows in causal_conv_rows(layer, fill, like, clip):
        residual[:, :, first:last] += rows
        del rows


def causal_conv_rows(
    layer: CogVideoXCausalConv3d, fill: Fill, like: torch.Tensor, clip: Clip
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """The causal convolution some rows at a time: the first row, the one after the last, and the result between.

    When a slice comes out, only its last row (and what is below) will be read again: `fill` writes one row above and
    one below those of a slice.
    """
    batch, time, height, width, channels = like.shape
    history, conv = layer.time_kernel_size - 1, layer.conv
    step = min(clip.rows.get(layer, height), height)
    old = clip.caches.pop(layer, None)
    new = None
    if not clip.is_last:
        # Each old frame is read before its place is written.
        new = old or keep((batch, history, height, width, channels), like, layer in clip.elsewhere)
        clip.caches[layer] = new

    def rows(first: int, last: int) -> torch.Tensor:
        above, below = max(first - 1, 0), min(last + 1, height)
        buffer = like.new_empty(batch, history + time, last - first + 2, width, channels)
        inner = buffer[:, :, above - (first - 1) : below - (first - 1)]
        if first == 0:
            buffer[:, :, 0] = 0
        if last == height:
            buffer[:, :, -1] = 0
        fill(inner[:, history:], above, below)
        inner[:, :history] = inner[:, history : history + 1] if old is None else old.read(above, below)
        if new is not None:
            # One row behind: the next rows still read the old frames of the one above them.
            done = height if last == height else last - 1
            new.write(above, inner[:, time : time + history, : done - above])
        return _conv3d(buffer, conv)

    for first in range(0, height, step):
        last = min(first + step, height)
        yield first, last, rows(first, last)


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
    scale, shift = _affine(frames, norm if zq is None else norm.norm_layer, impl)
    size = (1, 1, 1) if zq is None else zq.shape[1:4]
    time, height, width = frames.shape[1:4]
    device = frames.device
    frames_at = torch.tensor(_nearest_frames(time, size[0]), device=device)
    columns_at = torch.arange(width, device=device) * size[2] // width

    def fill(target: torch.Tensor, first: int, last: int) -> None:
        # The tables' rows that these rows read, and no others: in slices they would be more than the slice.
        low, high = first * size[1] // height, (last - 1) * size[1] // height + 1
        tables = (scale, shift) if zq is None else _modulated(scale, shift, norm, zq[:, :, low:high])
        rows_at = torch.arange(first, last, device=device) * size[1] // height - low
        ops.group_norm_modulate_silu(frames[:, :, first:last], *tables, frames_at, rows_at, columns_at, target, impl)

    return fill


def _affine(frames: torch.Tensor, group_norm: nn.GroupNorm, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
    """GroupNorm as one product and one sum a channel, `x * scale + shift`, each `(batch, 1, 1, 1, channels)`."""
    mean, inverse = ops.group_norm_statistics(frames, group_norm.num_groups, group_norm.eps, impl)
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


def _nearest_frames(time: int, low: int) -> list[int]:
    """Where in `low` frames each of `time` is, by nearest interpolation; of several in odd number the first is
    interpolated apart."""
    if low > 1 and time > 1 and time % 2 == 1:
        return [0, *(1 + i * (low - 1) // (time - 1) for i in range(time - 1))]
    return [i * low // time for i in range(time)]


def pointwise(frames: torch.Tensor, conv: nn.Conv3d) -> torch.Tensor:
    """A convolution of kernel size 1: a matrix product, which has no past and needs no cache."""
    return F.linear(frames, conv.weight.flatten(1), conv.bias)
