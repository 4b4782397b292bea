"""Residual blocks on channels-last frames."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXResnetBlock3D

from ..machine import return_freed_memory
from .convolution import add_causal_conv, causal_conv, padded_rows, product_of
from .layers import Clip, Fill, copied, normed, pointwise

# Frames of so many bytes are worth the time that fresh pages take after freed ones went back.
LARGE = 4 * 2**20


def resnets(
    blocks: Iterable[CogVideoXResnetBlock3D], holder: list[torch.Tensor], zq: torch.Tensor | None, clip: Clip
) -> torch.Tensor:
    """The frames in `holder` through all `blocks`.

    They are taken out of the list, so that no caller holds them longer than they are needed; they are overwritten.
    """
    frames = holder.pop()
    spare = None  # memory for what is between a block's convolutions
    for block in blocks:
        if frames.device.type == "cpu" and frames.nbytes >= LARGE:
            # A chunk frees tensors of many sizes: kept for reuse, they came to as much memory again as the frames take.
            return_freed_memory()
        fill = normed(frames, block.norm1, zq, clip.impl)
        if halves(block) and clip.slices(block.conv1, frames.shape[2]):
            frames, spare = _halved(block, fill, frames, clip)
            hidden = spare
        else:
            hidden = causal_conv(block.conv1, fill, frames, clip, spare)
            if block.in_channels != block.out_channels:
                frames = _shortcut(block, frames, clip)
        fill = normed(hidden, block.norm2, zq, clip.impl)
        add_causal_conv(block.conv2, fill, hidden, clip, frames)
        del fill, hidden
    return frames


def halves(block: CogVideoXResnetBlock3D) -> bool:
    """Whether what the block makes of its input, before and beside its second convolution, fits the input's memory."""
    return block.in_channels == 2 * block.out_channels and not block.use_conv_shortcut


def _halved(
    block: CogVideoXResnetBlock3D, fill: Fill, frames: torch.Tensor, clip: Clip
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shortcut and first convolution of a block that halves the channels, both written where `frames` were.

    A row of the input becomes a row of either. It is needed until the slice of rows below it is computed, so a slice's
    last row waits for the next.
    """
    pairs = frames.view(*frames.shape[:3], 2, frames.shape[3], block.out_channels)
    shortcut, hidden = pairs.unbind(3)
    height = frames.shape[2]
    waiting = pairs.new_empty(*pairs.shape[:2], *pairs.shape[3:])
    product = product_of(block.conv1, frames, clip)
    for first, last, buffer in padded_rows(block.conv1, fill, frames, clip, product.border):
        rows = product(buffer)
        del buffer
        if first > 0:
            pairs[:, :, first - 1] = waiting
        done = last if last == height else last - 1
        waiting[:, :, 1] = rows[:, :, -1]
        for t in range(frames.shape[1]):
            beside = pointwise(frames[:, t, first:last], block.conv_shortcut)
            waiting[:, t, 0] = beside[:, -1]
            shortcut[:, t, first:done] = beside[:, : done - first]
            hidden[:, t, first:done] = rows[:, t, : done - first]
            del beside
        del rows
    return shortcut, hidden


def _shortcut(block: CogVideoXResnetBlock3D, frames: torch.Tensor, clip: Clip) -> torch.Tensor:
    if block.use_conv_shortcut:
        return causal_conv(block.conv_shortcut, copied(frames), frames, clip)
    return pointwise(frames, block.conv_shortcut)
