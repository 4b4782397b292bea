"""The decoder, layer by layer on channels-last frames."""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXDecoder3D

from .convolution import causal_conv, padded_rows, product_of
from .history import keep
from .layers import Clip, copied, normed
from .resampling import upsample
from .resnet import resnets


def decode_chunk(decoder: CogVideoXDecoder3D, latents: torch.Tensor, clip: Clip) -> torch.Tensor:
    """One chunk of a video.

    Args:
        latents: `(batch, latent_channels, time, height, width)`.
        clip: of the whole video; its caches go from chunk to chunk.

    Returns:
        Pixels `(batch, out_channels, frames, 8 * height, 8 * width)`.
    """
    zq = latents.permute(0, 2, 3, 4, 1).contiguous()
    holder = [causal_conv(decoder.conv_in, copied(zq), zq, clip)]
    holder.append(resnets(decoder.mid_block.resnets, holder, zq, clip))
    for block in decoder.up_blocks:
        holder.append(resnets(block.resnets, holder, zq, clip))
        for layer in block.upsamplers or ():
            holder.append(upsample(layer, holder, clip))
    return _pixels(decoder, holder, zq, clip).permute(0, 4, 1, 2, 3).contiguous()


def _pixels(decoder: CogVideoXDecoder3D, holder: list[torch.Tensor], zq: torch.Tensor, clip: Clip) -> torch.Tensor:
    frames = holder.pop()
    layer, fill = decoder.conv_out, normed(frames, decoder.norm_out, zq, clip.impl)
    if layer not in clip.elsewhere:
        return causal_conv(layer, fill, frames, clip)
    # The frames leave no room for pixels beside them.
    kept = keep((*frames.shape[:4], layer.conv.out_channels), frames, elsewhere=True)
    product = product_of(layer, frames, clip)
    for first, _, buffer in padded_rows(layer, fill, frames, clip, product.border):
        kept.write(first, product(buffer))
        del buffer
    height, device = frames.shape[2], frames.device
    del frames, fill
    return kept.read(0, height).to(device)
