"""The encoder and the decoder, layer by layer on channels-last frames."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import (
    CogVideoXDecoder3D,
    CogVideoXEncoder3D,
    CogVideoXResnetBlock3D,
)

from ..machine import return_freed_memory
from .chunks import ChunkState, allocate_frames
from .convolution import add_causal_conv, causal_conv, convolution_of, padded_rows
from .norms import Fill, copied, normed, pointwise
from .resampling import downsample, upsample

# Frames of so many bytes are worth the time that fresh pages take after freed ones went back.
LARGE = 4 * 2**20


def decode_chunk(decoder: CogVideoXDecoder3D, latents: torch.Tensor, state: ChunkState) -> torch.Tensor:
    """One chunk of a video.

    Args:
        latents: `(batch, latent_channels, time, height, width)`.
        state: of the whole video.

    Returns:
        Pixels `(batch, out_channels, frames, 8 * height, 8 * width)`.
    """
    zq = latents.permute(0, 2, 3, 4, 1).contiguous()
    state.put(causal_conv(decoder.conv_in, copied(zq), zq, state))
    _resnets(decoder.mid_block.resnets, zq, state)
    for block in decoder.up_blocks:
        _resnets(block.resnets, zq, state)
        for layer in block.upsamplers or ():
            upsample(layer, state)
    return _pixels(decoder, zq, state).permute(0, 4, 1, 2, 3).contiguous()


def _pixels(decoder: CogVideoXDecoder3D, zq: torch.Tensor, state: ChunkState) -> torch.Tensor:
    frames = state.take()
    layer, fill = decoder.conv_out, normed(frames, decoder.norm_out, zq, state)
    if layer not in state.slicing.spilled:
        return causal_conv(layer, fill, frames, state)
    # The frames leave no room for pixels beside them.
    spilled = allocate_frames((*frames.shape[:4], layer.conv.out_channels), frames, spilled=True)
    convolve = convolution_of(layer, frames, state)
    for first, _, buffer in padded_rows(layer, fill, frames, state, convolve.border):
        spilled.write(first, convolve(buffer))
        del buffer
    height, device = frames.shape[2], frames.device
    del frames, fill
    return spilled.read(0, height).to(device)


def encode_chunk(encoder: CogVideoXEncoder3D, pixels: torch.Tensor, state: ChunkState) -> torch.Tensor:
    """One chunk of a video.

    Args:
        pixels: `(batch, in_channels, frames, height, width)`.
        state: of the whole video.

    Returns:
        The posterior's mean and log-variance `(batch, time, height / 8, width / 8, 2 * latent_channels)`.
    """
    frames = pixels.permute(0, 2, 3, 4, 1).contiguous()
    state.put(causal_conv(encoder.conv_in, copied(frames), frames, state))
    del frames
    for block in encoder.down_blocks:
        _resnets(block.resnets, None, state)
        for layer in block.downsamplers or ():
            downsample(layer, state)
    _resnets(encoder.mid_block.resnets, None, state)
    frames = state.take()
    return causal_conv(encoder.conv_out, normed(frames, encoder.norm_out, None, state), frames, state)


def _resnets(blocks: Iterable[CogVideoXResnetBlock3D], zq: torch.Tensor | None, state: ChunkState) -> None:
    """The frames in `state` through all `blocks`; they are overwritten."""
    frames = state.take()
    between = None  # memory for what is between a block's convolutions
    for block in blocks:
        if frames.device.type == "cpu" and frames.nbytes >= LARGE:
            # A chunk frees tensors of many sizes: kept for reuse, they came to as much memory again as the frames take.
            return_freed_memory()
        fill = normed(frames, block.norm1, zq, state)
        if halves(block) and state.is_sliced(block.conv1, frames.shape[2]):
            frames, between = _halved(block, fill, frames, state)
            hidden = between
        else:
            hidden = causal_conv(block.conv1, fill, frames, state, between)
            if block.in_channels != block.out_channels:
                frames = _shortcut(block, frames, state)
        fill = normed(hidden, block.norm2, zq, state)
        add_causal_conv(block.conv2, fill, hidden, state, frames)
        del fill, hidden
    state.put(frames)


def halves(block: CogVideoXResnetBlock3D) -> bool:
    """Whether what the block makes of its input, before and beside its second convolution, fits the input's memory."""
    return block.in_channels == 2 * block.out_channels and not block.use_conv_shortcut


def _halved(
    block: CogVideoXResnetBlock3D, fill: Fill, frames: torch.Tensor, state: ChunkState
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shortcut and first convolution of a block that halves the channels, both written where `frames` were.

    A row of the input becomes a row of either. It is needed until the slice of rows below it is computed, so a slice's
    last row waits for the next.
    """
    pairs = frames.view(*frames.shape[:3], 2, frames.shape[3], block.out_channels)
    shortcut, hidden = pairs.unbind(3)
    height = frames.shape[2]
    waiting = pairs.new_empty(*pairs.shape[:2], *pairs.shape[3:])
    convolve = convolution_of(block.conv1, frames, state)
    for first, last, buffer in padded_rows(block.conv1, fill, frames, state, convolve.border):
        rows = convolve(buffer)
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


def _shortcut(block: CogVideoXResnetBlock3D, frames: torch.Tensor, state: ChunkState) -> torch.Tensor:
    if block.use_conv_shortcut:
        return causal_conv(block.conv_shortcut, copied(frames), frames, state)
    return pointwise(frames, block.conv_shortcut)
