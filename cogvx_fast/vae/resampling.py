"""Changing the resolution of channels-last frames `(batch, time, height, width, channels)`."""

from __future__ import annotations

from collections.abc import Container

import torch
import torch.nn.functional as F
from cogvx_kernels import ops
from diffusers.models.downsampling import CogVideoXDownsample3D
from diffusers.models.upsampling import CogVideoXUpsample3D
from torch import nn

from ..plan import Implementation
from .chunks import ChunkState, allocate_frames


def upsample(layer: CogVideoXUpsample3D, state: ChunkState) -> None:
    """Nearest doubling of height and width (and time, where the layer compresses it) and the layer's 3x3 convolution.

    An output row `2i + p` reads input rows `i - 1 + p` and `i + p` only, columns likewise: four convolutions of 2x2 on
    the input, whose weights are sums of the 3x3's, give the four phases of the output. Frames that doubling makes
    equal are convolved once.

    It takes the frames from `state` and leaves its own there. Frames that are spilled make room for the output and come
    back some rows at a time.
    """
    frames, convolution = state.take(), state.plan.convolution
    batch, time, height, width, channels = frames.shape
    frames, start = _with_borders(frames, state)
    reach = frames.shape[2]  # the rows and those of the neighbours
    if upsamples_at_once(layer, convolution, state.slicing.spilled):
        conv = layer.conv
        out = ops.upsample_conv2d(frames, conv.weight, conv.bias, layer.compress_time, convolution)
        state.put(out if reach == height else out[:, :, 2 * start : 2 * (start + height)].contiguous())
        return
    like = frames.new_empty(0)
    numbers = copies(time, layer.compress_time)
    weights = _phases(layer.conv.weight)
    convolve = _phases_in_torch
    if is_direct(convolution, like.dtype):
        weights = {phase: ops.pack_conv3d(weight, "direct") for phase, weight in weights.items()}
        convolve = _phases_in_place
    at_once = min(state.slicing.frames_at_once.get(layer, time), time)
    waiting = None
    if layer in state.slicing.spilled:
        # A frame is `reach` rows of what waits.
        waiting = allocate_frames((batch, 1, time * reach, width, channels), like, spilled=True)
        for t in range(time):
            waiting.write(t * reach, frames[:, t : t + 1])
        del frames
    out = like.new_empty(batch, sum(numbers), 2 * height, 2 * width, layer.conv.out_channels)
    step = min(state.slicing.rows.get(layer, height), height) if at_once == 1 else height
    target = 0
    for first in range(0, time, at_once):
        last = min(first + at_once, time)
        for top in range(0, height, step):
            bottom = min(top + step, height)
            # A row more on each side, where there is one.
            above, below = max(top + start - 1, 0), min(bottom + start + 1, reach)
            if waiting is None:
                some = frames[:, first:last, above:below]
            else:
                # More rows than a frame has belong to several frames, of which all are taken.
                some = waiting.read(first * reach + above, (last - 1) * reach + below).to(like.device)
                some = some.view(batch, last - first, below - above, width, channels)
            rows = (top + start - above, bottom - top)
            for sample in range(batch):
                strip = some[sample].contiguous()
                place = out[sample, target : target + sum(numbers[first:last]), 2 * top : 2 * bottom]
                convolve(strip, rows, weights, layer.conv.bias, numbers[first:last], place)
                del strip
            del some
        target += sum(numbers[first:last])
    state.put(out)


def _with_borders(frames: torch.Tensor, state: ChunkState) -> tuple[torch.Tensor, int]:
    """Frames with the rows above and below them that are other processes', and which row is then the first of these."""
    if state.band is None:
        return frames, 0
    above, below = state.band.swapped(frames[:, :, :1], frames[:, :, -1:])
    joined = torch.cat([part for part in (above, frames, below) if part is not None], dim=2)
    return joined, 0 if above is None else 1


def is_direct(convolution: Implementation, dtype: torch.dtype) -> bool:
    """Whether frames of `dtype` are convolved with our own convolution that spares no products."""
    return convolution == "cpu" and dtype == torch.float32


def upsamples_at_once(layer: CogVideoXUpsample3D, convolution: Implementation, spilled: Container[nn.Module]) -> bool:
    """Whether it is one kernel, which has no memory but its output's. Spilled frames come back in rows."""
    return convolution == "triton" and layer not in spilled


def _phases_in_torch(
    strip: torch.Tensor,
    rows: tuple[int, int],
    weights: dict[tuple[int, int], torch.Tensor],
    bias: torch.Tensor | None,
    numbers: list[int],
    place: torch.Tensor,
) -> None:
    """The four phases of some rows of frames.

    Args:
        strip: `(frames, height, width, channels)`, the rows and those above and below that there are.
        rows: the first of them in `strip`, and how many they are.
        numbers: how often each frame is written.
        place: `(written frames, 2 * rows, 2 * width, channels)`.
    """
    first, number = rows
    width = strip.shape[2]
    for (p, q), weight in weights.items():
        # Padding on both sides gives one row and column too many; which, is the phase's own.
        padded = F.conv2d(strip.permute(0, 3, 1, 2), weight, bias, padding=1)
        phase = padded[:, :, first + p : first + p + number, q : q + width].permute(0, 2, 3, 1)
        target = 0
        for frame, copies in zip(phase, numbers, strict=True):
            place[target : target + copies, p::2, q::2] = frame
            target += copies
        del padded, phase, frame


def _phases_in_place(
    strip: torch.Tensor,
    rows: tuple[int, int],
    weights: dict[tuple[int, int], torch.Tensor],
    bias: torch.Tensor | None,
    numbers: list[int],
    place: torch.Tensor,
) -> None:
    """The same with our own convolution and packed weights, a frame at a time."""
    first, number = rows
    _, height, width, channels = strip.shape
    target = 0
    for frame, copies in zip(strip, numbers, strict=True):
        padded = strip.new_zeros(1, 1, number + 2, width + 2, channels)
        above = 1 - first
        padded[0, 0, above : above + height, 1:-1] = frame
        for (p, q), weight in weights.items():
            corner = padded[:, :, p : p + number + 1, q : q + width + 1]
            ops.packed_conv3d(corner, weight, bias, (1, 2, 2), place[None, target : target + 1, p::2, q::2])
        place[target + 1 : target + copies] = place[target]
        target += copies
        del padded, corner


def copies(time: int, doubles: bool) -> list[int]:
    """How often each frame appears in the output: twice where time doubles, the first of an odd number once."""
    if not doubles:
        return [1] * time
    return [1 if time % 2 == 1 and i == 0 else 2 for i in range(time)]


def _phases(weight: torch.Tensor) -> dict[tuple[int, int], torch.Tensor]:
    """Weights `(out, in, 2, 2)` of the four phases of a 3x3 convolution after nearest doubling."""
    return {
        (p, q): phase.contiguous(memory_format=torch.channels_last)
        for p, phases in enumerate(ops.phase_weights(weight))
        for q, phase in enumerate(phases)
    }


def downsample(layer: CogVideoXDownsample3D, state: ChunkState) -> None:
    """The mean of pairs of frames (where the layer compresses time; of an odd number the first stays) and the layer's
    3x3 convolution of stride 2, with a row and a column of zeros after the last.

    It takes the frames from `state` and leaves its own there.
    """
    frames = state.take()
    batch, time, height, width, channels = frames.shape
    single = time % 2 if layer.compress_time else time
    pooled = pooled_frames(time, layer.compress_time)
    conv = layer.conv
    own = is_direct(state.plan.convolution, frames.dtype)
    packed = ops.pack_conv3d(conv.weight, "direct") if own else None
    out = frames.new_empty(batch, pooled, height // 2, width // 2, conv.out_channels)
    padded = frames.new_empty(1, 1, height + 1, width + 1, channels)
    padded[:, :, -1].zero_()
    padded[:, :, :, -1].zero_()
    if state.band is not None:  # the row below is that of the next process
        frames, start = _with_borders(frames, state)
        frames = frames[:, :, start:]
    inner = padded[0, 0, : frames.shape[2], :-1]
    for sample in range(batch):
        for target in range(pooled):
            if target < single:
                inner.copy_(frames[sample, target])
            else:
                i = single + 2 * (target - single)
                # torch.mean of two takes many times as long. Halves are exact, so their sum is rounded as the mean is.
                inner.copy_(frames[sample, i]).mul_(0.5).add_(frames[sample, i + 1], alpha=0.5)
            place = out[sample, target]
            if packed is not None:
                ops.packed_conv3d(padded, packed, conv.bias, (1, 3, 3), place[None, None], stride=2)
            else:
                place.copy_(F.conv2d(padded[0].permute(0, 3, 1, 2), conv.weight, conv.bias, 2)[0].permute(1, 2, 0))
    state.put(out)


def pooled_frames(time: int, halves: bool) -> int:
    """How many frames are left of `time`."""
    return (time + 1) // 2 if halves else time
