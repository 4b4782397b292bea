"""Residual blocks on channels-last frames."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXResnetBlock3D

from .layers import Clip, causal_conv, copied, normed, pointwise


def resnets(
    blocks: Iterable[CogVideoXResnetBlock3D], holder: list[torch.Tensor], zq: torch.Tensor | None, clip: Clip
) -> torch.Tensor:
    """The frames in `holder` through all `blocks`.

    They are taken out of the list, so that no caller holds them longer than they are needed; they are overwritten.
    """
    frames = holder.pop()
    for block in blocks:
        fill = normed(frames, block.norm1, zq, clip.impl)
        hidden = causal_conv(block.conv1, fill, frames, clip)
        del fill
        if block.in_channels != block.out_channels:
            frames = _shortcut(block, frames, clip)
        fill = normed(hidden, block.norm2, zq, clip.impl)
        frames = causal_conv(block.conv2, fill, hidden, clip, residual=frames)
        del fill, hidden
    return frames


def _shortcut(block: CogVideoXResnetBlock3D, frames: torch.Tensor, clip: Clip) -> torch.Tensor:
    if block.use_conv_shortcut:
        return causal_conv(block.conv_shortcut, copied(frames), frames, clip)
    return pointwise(frames, block.conv_shortcut)
