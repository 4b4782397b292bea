"""The encoder, layer by layer on channels-last frames."""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXEncoder3D

from .convolution import causal_conv
from .layers import Clip, copied, normed
from .resampling import downsample
from .resnet import resnets


def encode_chunk(encoder: CogVideoXEncoder3D, pixels: torch.Tensor, clip: Clip) -> torch.Tensor:
    """One chunk of a video.

    Args:
        pixels: `(batch, in_channels, frames, height, width)`.
        clip: of the whole video; its caches go from chunk to chunk.

    Returns:
        The posterior's mean and log-variance `(batch, time, height / 8, width / 8, 2 * latent_channels)`.
    """
    frames = pixels.permute(0, 2, 3, 4, 1).contiguous()
    holder = [causal_conv(encoder.conv_in, copied(frames), frames, clip)]
    del frames
    for block in encoder.down_blocks:
        holder.append(resnets(block.resnets, holder, None, clip))
        for layer in block.downsamplers or ():
            holder.append(downsample(layer, holder.pop(), clip))
    holder.append(resnets(encoder.mid_block.resnets, holder, None, clip))
    frames = holder.pop()
    return causal_conv(encoder.conv_out, normed(frames, encoder.norm_out, None, clip.impl), frames, clip)
