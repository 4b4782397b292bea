"""The causal convolutions on channels-last frames, each made of a reference layer's own weights.

A convolution reads its frames from a buffer that has the causal frames in front and zeros around; a buffer holds as
many rows of the frames as the plan of the memory wants. The GPU's kernel needs neither: it takes the causal frames
where they are, and zeros for granted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from cogvx_kernels import ops
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d, CogVideoXSafeConv3d

from ..plan import Implementation
from .chunks import ChunkState, allocate_frames
from .norms import Fill


class Convolution(Protocol):
    """The convolution of a padded buffer with a layer's weights.

    Attributes:
        border: columns of zeros that it wants on each side of a buffer.
    """

    border: int

    def __init__(self, conv: CogVideoXSafeConv3d): ...

    # What `padded_rows` gives it: a tensor, or for the kernel an `UnpaddedInput`.
    def __call__(self, buffer: Any, out: torch.Tensor | None = None, adds: bool = False) -> torch.Tensor:
        """The convolution of `buffer`; with `out`, written or added there, which is returned."""


@dataclass
class UnpaddedInput:
    """What the kernel reads in the place of a buffer.

    Attributes:
        frames: the rows of a slice and those above and below that there are.
        past: those of the causal frames, or None where there are none.
        rows: which of them are the slice.
        remember: what to call, when they are convolved, with the last frames of both: they may lie where the past does.
    """

    frames: torch.Tensor
    past: torch.Tensor | None
    rows: tuple[int, int]
    remember: Callable[[torch.Tensor], None] | None


class TorchConvolution:
    """torch's convolution, which pads the columns itself."""

    border = 0

    def __init__(self, conv: CogVideoXSafeConv3d):
        self._conv = conv

    def __call__(self, buffer: torch.Tensor, out: torch.Tensor | None = None, adds: bool = False) -> torch.Tensor:
        conv = self._conv
        result = F.conv3d(buffer.permute(0, 4, 1, 2, 3), conv.weight, conv.bias, padding=(0, 0, conv.padding[2]))
        result = result.permute(0, 2, 3, 4, 1)
        if out is None:
            return result.contiguous()
        return out.add_(result) if adds else out.copy_(result)


class DirectConvolution:
    """Our own convolution for fp32 on a CPU, which rounds less than either order of torch's and writes in place."""

    def __init__(self, conv: CogVideoXSafeConv3d):
        self._conv, self._packed = conv, ops.pack_conv3d(conv.weight, "direct")
        self.border = conv.padding[2]

    def __call__(self, buffer: torch.Tensor, out: torch.Tensor | None = None, adds: bool = False) -> torch.Tensor:
        conv = self._conv
        out = _valid(buffer, conv) if out is None else out
        ops.packed_conv3d(buffer, self._packed, conv.bias, conv.kernel_size, out, adds)
        return out


class WinogradConvolution:
    """A convolution with fewer products, in bf16 too, where it rounds once, after `adds`."""

    border = 1

    def __init__(self, conv: CogVideoXSafeConv3d):
        self._conv, self._packed = conv, ops.pack_conv3d(conv.weight, "winograd")
        self._bias = None if conv.bias is None else conv.bias.float()

    def __call__(self, buffer: torch.Tensor, out: torch.Tensor | None = None, adds: bool = False) -> torch.Tensor:
        conv = self._conv
        out = _valid(buffer, conv) if out is None else out
        ops.packed_conv3d(buffer, self._packed, self._bias, conv.kernel_size, out, adds, impl="winograd")
        return out


def _valid(buffer: torch.Tensor, conv: CogVideoXSafeConv3d) -> torch.Tensor:
    """Memory for what a convolution makes of a padded buffer."""
    batch, time, height, width, _ = buffer.shape
    kt, kh, kw = conv.kernel_size
    return buffer.new_empty(batch, time - kt + 1, height - kh + 1, width - kw + 1, conv.out_channels)


class TritonConvolution:
    """The kernel of a GPU, which writes and adds in place."""

    border = 0

    def __init__(self, conv: CogVideoXSafeConv3d):
        self._conv = conv
        # The order that the kernel reads, once for all slices.
        self._weight = conv.weight.contiguous(memory_format=torch.channels_last_3d)

    def __call__(self, buffer: UnpaddedInput, out: torch.Tensor | None = None, adds: bool = False) -> torch.Tensor:
        residual = out if adds else None
        given = (buffer.frames, self._weight, self._conv.bias, buffer.past, residual, out, buffer.rows)
        result = ops.causal_conv3d(*given, impl="triton")
        if buffer.remember is not None:
            buffer.remember(_last_frames(buffer.past, buffer.frames, self._conv.kernel_size[0] - 1))
        return result


def convolution_of(layer: CogVideoXCausalConv3d, like: torch.Tensor, state: ChunkState) -> Convolution:
    """The convolution of a layer; made once for all slices of a chunk, as it may reorder the weights."""
    if layer in state.slicing.unpacked:
        return TorchConvolution(layer.conv)
    return convolution_class(layer.conv, state.plan.convolution, like.dtype, like.shape[:4].numel())(layer.conv)


def convolution_class(
    conv: CogVideoXSafeConv3d, implementation: Implementation, dtype: torch.dtype, pixels: int
) -> type[Convolution]:
    """The class of the convolution with the weights of `conv`.

    Args:
        implementation: as `VaePlan.convolution` has it.
        pixels: of all frames of a chunk and all samples.
    """
    if implementation == "triton":
        return TritonConvolution
    if implementation == "torch":
        return TorchConvolution
    if ops.winograd_pays(conv.kernel_size, conv.in_channels, conv.out_channels, pixels, dtype):
        return WinogradConvolution
    return DirectConvolution if dtype == torch.float32 else TorchConvolution


def causal_conv(
    layer: CogVideoXCausalConv3d, fill: Fill, like: torch.Tensor, state: ChunkState, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The causal convolution of what `fill` writes: new frames, or `out` with them in it.

    Args:
        like: frames of the shape that `fill` writes.
    """
    convolve = convolution_of(layer, like, state)
    if out is None and state.is_sliced(layer, like.shape[2]):
        out = like.new_empty(*like.shape[:4], layer.conv.out_channels)
    for first, last, buffer in padded_rows(layer, fill, like, state, convolve.border):
        result = convolve(buffer, None if out is None else out[:, :, first:last])
        del buffer
    return result if out is None else out


def add_causal_conv(
    layer: CogVideoXCausalConv3d, fill: Fill, like: torch.Tensor, state: ChunkState, residual: torch.Tensor
) -> None:
    """Adds the causal convolution of what `fill` writes, which has the shape of `like`, to `residual`."""
    convolve = convolution_of(layer, like, state)
    for first, last, buffer in padded_rows(layer, fill, like, state, convolve.border):
        convolve(buffer, residual[:, :, first:last], adds=True)
        del buffer


def padded_rows(
    layer: CogVideoXCausalConv3d, fill: Fill, like: torch.Tensor, state: ChunkState, border: int
) -> Iterator[tuple[int, int, torch.Tensor | UnpaddedInput]]:
    """What a causal convolution reads, some rows at a time: the first row, the one after the last, and the buffer.

    When a slice comes out, only its last row (and what is below) will be read again: `fill` writes one row above and
    one below those of a slice.
    """
    batch, time, height, width, channels = like.shape
    history = layer.time_kernel_size - 1
    over, under = _borders(layer, fill, like, state)
    step = min(state.slicing.rows.get(layer, height), height)
    old = state.conv_cache.pop(layer, None)
    new = None
    if not state.is_last:
        # Each old frame is read before its place is written.
        new = old or allocate_frames((batch, history, height, width, channels), like, layer in state.slicing.spilled)
        state.conv_cache[layer] = new

    def padded(first: int, last: int) -> torch.Tensor:
        above, below = max(first - 1, 0), min(last + 1, height)
        buffer = like.new_empty(batch, history + time, last - first + 2, width + 2 * border, channels)
        inner = buffer[:, :, above - (first - 1) : below - (first - 1), border : border + width]
        for row, ends, border_row in ((0, first == 0, over), (-1, last == height, under)):
            if ends and border_row is None:
                buffer[:, :, row].zero_()
            elif ends and border_row is not None:
                buffer[:, :, row, border : border + width] = border_row
        if border:
            buffer[:, :, :, :border].zero_()
            buffer[:, :, :, -border:].zero_()
        fill(inner[:, history:], above, below)
        inner[:, :history] = inner[:, history : history + 1] if old is None else old.read(above, below)
        if new is not None:
            # One row behind: the next rows still read the old frames of the one above them.
            done = height if last == height else last - 1
            new.write(above, inner[:, time : time + history, : done - above])
        return buffer

    def unpadded(first: int, last: int) -> UnpaddedInput:
        above, below = max(first - 1, 0), min(last + 1, height)
        top = over if first == 0 else None
        bottom = under if last == height else None
        start = 0 if top is None else 1
        rows = start + below - above + (0 if bottom is None else 1)
        frames = like.new_empty(batch, time, rows, width, channels)
        fill(frames[:, :, start : start + below - above], above, below)
        past = None if old is None else old.read(above, below).to(like.device)
        for place, border_row in ((0, top), (-1, bottom)):
            if border_row is not None:
                frames[:, :, place] = border_row[:, history:]
        if past is not None and rows > below - above:  # alone it is not copied
            borders = [None if row is None else row[:, :history, None] for row in (top, bottom)]
            past = torch.cat([part for part in (borders[0], past, borders[1]) if part is not None], dim=2)
        done = height if last == height else last - 1  # one row behind, as above

        def remember(frames: torch.Tensor) -> None:
            assert new is not None
            new.write(above, frames[:, :, start : start + done - above])

        own = first - above + start
        return UnpaddedInput(frames, past, (own, own + last - first), None if new is None else remember)

    for first in range(0, height, step):
        last = min(first + step, height)
        yield first, last, unpadded(first, last) if state.plan.convolution == "triton" else padded(first, last)


def _borders(
    layer: CogVideoXCausalConv3d, fill: Fill, like: torch.Tensor, state: ChunkState
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What the convolution reads of the rows above this process's band and below it, which its neighbours have.

    Returns:
        Of each `(batch, causal frames and new ones, width, channels)`; None where the frame ends.
    """
    if state.band is None:
        return None, None
    batch, time, height, width, channels = like.shape
    history = layer.time_kernel_size - 1
    ends = []
    for row in (0, height - 1):
        end = like.new_empty(batch, time, 1, width, channels)
        fill(end, row, row + 1)
        ends.append(end)
    old = state.border_cache.pop(layer, None)
    borders: list[torch.Tensor | None] = []
    for number, new in enumerate(state.band.swapped(*ends)):
        if new is None:
            borders.append(None)
            continue
        before = None if old is None else old[number]
        past = new[:, :1].expand(-1, history, -1, -1, -1) if before is None else before[:, :, None]
        borders.append(torch.cat([past, new], dim=1)[:, :, 0])
    if not state.is_last:
        state.border_cache[layer] = tuple(None if row is None else row[:, time:].clone() for row in borders)
    over, under = borders
    return over, under


def _last_frames(past: torch.Tensor | None, frames: torch.Tensor, number: int) -> torch.Tensor:
    """The last `number` of `past` and `frames`; the first frame stands for a past that is not there."""
    missing = number - frames.shape[1]
    if missing <= 0:
        return frames[:, frames.shape[1] - number :]
    before = frames[:, :1].expand(-1, missing, -1, -1, -1) if past is None else past[:, number - missing :]
    return torch.cat([before, frames], dim=1)
