"""What the layers of the autoencoder share, and what stands before a convolution: copies and norms.

Frames are `(batch, time, height, width, channels)`, their rows contiguous. What comes before a convolution writes
where the convolution reads, a number of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from cogvx_kernels import ops
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d, CogVideoXSpatialNorm3D
from torch import nn

from .history import KeptFrames

# (the buffer's rows to be written, first row of the frames, the row after the last)
Fill = Callable[[torch.Tensor, int, int], None]


@dataclass
class Clip:
    """What the chunks of one video share while they go through the layers.

    Attributes:
        impl: of the operations between the convolutions, as `cogvx_kernels.ops` names it.
        product: of the convolutions themselves: "torch", or "cpu" or "triton" for our own, see `convolution`.
        rows: how many rows of a convolution are computed at a time, all of them where it is not named.
        frames_at_once: how many frames are resampled at a time, likewise.
        plain: convolutions for whose weights, in an order of our own, there is no room: torch's runs.
        elsewhere: layers whose waiting frames (a convolution's last ones, an upsampling's input, the pixels) lie
            outside of the device's memory, see `history`.
        caches: of each causal convolution the last frames that it read.
        is_last: whether no chunk follows this one: nothing is cached then.
    """

    impl: str = "torch"
    product: str = "torch"
    rows: Mapping[nn.Module, int] = field(default_factory=dict)
    frames_at_once: Mapping[nn.Module, int] = field(default_factory=dict)
    elsewhere: Container[nn.Module] = frozenset()
    plain: Container[nn.Module] = frozenset()
    caches: dict[nn.Module, KeptFrames] = field(default_factory=dict)
    is_last: bool = False

    def slices(self, layer: CogVideoXCausalConv3d, height: int) -> bool:
        """Whether a convolution of frames of `height` is computed some rows at a time."""
        return self.rows.get(layer, height) < height


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
