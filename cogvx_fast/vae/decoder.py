"""The decoder, layer by layer on channels-last frames."""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXDecoder3D

from .layers import Clip, causal_conv, copied, normed
from .resampling import upsample
from .resnet import resnets


def decode_chunk(decoder: CogVideoXDecoder3D, latents: torch.Tensor, clip: Clip) -> torch.Tensor:
    """One chunk of a video.

    Args:
        latents: `(batch, latent_channels, time, height, width)`.
        clip: of the whole video; its caches go from chunk to chunk.

    Returns:
        Pixels `(batch, frames, 8 * height, 8 * width, out_channels)`.
    """
    zq = latents.permute(0, 2, 3, 4, 1).contiguous()
    holder = [causal_conv(decoder.conv_in, copied(zq), zq, clip)]
    holder.append(resnets(decoder.mid_block.resnets, holder, zq, clip))
    for block in decoder.up_blocks:
        holder.append(resnets(block.resnets, holder, zq, clip))
        for layer in block.upsamplers or ():
            holder.append(upsample(layer, holder.pop(), clip))
    frames = holder.pop()
    return causal_conv(decoder.conv_out, normed(frames, decoder.norm_out, zq, clip.impl), frames, clip)
