"""Patch and position embedding of the video, joined behind the projected text."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import CogVideoXPatchEmbed

from ..family import PIXELS_PER_LATENT


def embed_patches(patch_embed: CogVideoXPatchEmbed, latents: torch.Tensor) -> torch.Tensor:
    """Video tokens `(batch, frames * rows * columns, dim)` of latents `(batch, frames, channels, height, width)`."""
    if patch_embed.patch_size_t is None:
        tokens = patch_embed.proj(latents.flatten(0, 1)).flatten(2).transpose(1, 2)  # (batch * frames, patches, dim)
        return tokens.unflatten(0, latents.shape[:2]).flatten(1, 2)
    p, p_t = patch_embed.patch_size, patch_embed.patch_size_t
    patches = latents.unflatten(4, (-1, p)).unflatten(3, (-1, p)).unflatten(1, (-1, p_t))
    # (batch, T, p_t, channels, H, p, W, p) -> (batch, T, H, W, channels, p_t, p, p)
    patches = patches.permute(0, 1, 4, 6, 3, 2, 5, 7)
    return patch_embed.proj(patches.flatten(4).flatten(1, 3))


def embed_rows(patch_embed: CogVideoXPatchEmbed, latents: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Video tokens `first` to `last` (exclusive) of `embed_patches`; frames without any of them are not embedded."""
    each = video_tokens(patch_embed, latents[:, : patch_embed.patch_size_t or 1])
    p_t, start, end = patch_embed.patch_size_t or 1, first // each, -(-last // each)
    tokens = embed_patches(patch_embed, latents[:, start * p_t : max(end, start + 1) * p_t])
    return tokens[:, first - start * each : last - start * each]


def video_tokens(patch_embed: CogVideoXPatchEmbed, latents: torch.Tensor) -> int:
    """How many tokens latents `(batch, frames, channels, height, width)` are."""
    frames, height, width = latents.shape[1], latents.shape[3], latents.shape[4]
    p, p_t = patch_embed.patch_size, patch_embed.patch_size_t or 1
    return frames // p_t * (height // p) * (width // p)


def check_size(patch_embed: CogVideoXPatchEmbed, latents: torch.Tensor, text_length: int) -> None:
    """Raise a ValueError for a size that patches do not fill, or that a checkpoint's positions were not made for."""
    p, p_t = patch_embed.patch_size, patch_embed.patch_size_t or 1
    frames, height, width = latents.shape[1], latents.shape[3], latents.shape[4]
    if height % p or width % p:
        raise ValueError(
            f"latents of {height}x{width} do not fill patches of {p}x{p}: height and width must be multiples of {p},"
            f" that is of {PIXELS_PER_LATENT * p} pixels"
        )
    if frames % p_t:
        raise ValueError(
            f"{frames} latent frames do not fill patches of {p_t}: this checkpoint takes a multiple of {p_t}; the"
            " pipelines pad them when they are given num_frames rather than latents"
        )
    if not has_positions(patch_embed):
        return
    if text_length != patch_embed.max_text_seq_length:
        raise ValueError(
            f"encoder_hidden_states has {text_length} text tokens, but this checkpoint adds position embeddings made"
            f" for {patch_embed.max_text_seq_length}: pass max_sequence_length={patch_embed.max_text_seq_length}"
        )
    own = (patch_embed.sample_height, patch_embed.sample_width)
    if patch_embed.use_learned_positional_embeddings and (height, width) != own:
        pixels = [side * PIXELS_PER_LATENT for side in own]
        raise ValueError(
            f"latents of {height}x{width} do not fit: this checkpoint has learned positions for"
            f" {own[0]}x{own[1]} latents, that is {pixels[0]}x{pixels[1]} pixels, only"
        )


def has_positions(patch_embed: CogVideoXPatchEmbed) -> bool:
    """Whether positions are added to the tokens (sin-cos, learned) rather than rotated into attention alone."""
    return patch_embed.use_positional_embeddings or patch_embed.use_learned_positional_embeddings


def joint_positions(patch_embed: CogVideoXPatchEmbed, latents: torch.Tensor) -> torch.Tensor:
    """Position embedding of the joint stream, `(1, text_length + tokens, dim)` in the dtype of `latents`."""
    frames, height, width = latents.shape[1], latents.shape[3], latents.shape[4]
    own = (patch_embed.sample_height, patch_embed.sample_width)
    sample_frames = (frames - 1) * patch_embed.temporal_compression_ratio + 1
    if (height, width, sample_frames) == (*own, patch_embed.sample_frames):
        positions = patch_embed.pos_embedding
    else:
        positions = patch_embed._get_positional_embeddings(height, width, sample_frames, device=latents.device)
    return positions.to(device=latents.device, dtype=latents.dtype)  # an offloaded buffer may be elsewhere


def unpatchify(tokens: torch.Tensor, patch_size: int, patch_size_t: int | None, latents: torch.Size) -> torch.Tensor:
    """Tokens of the video back to `(batch, frames, out_channels, height, width)`, the grid given by `latents`."""
    batch, frames, _, height, width = latents
    p = patch_size
    if patch_size_t is None:
        grid = tokens.reshape(batch, frames, height // p, width // p, -1, p, p)
        return grid.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
    p_t = patch_size_t
    grid = tokens.reshape(batch, (frames + p_t - 1) // p_t, height // p, width // p, -1, p_t, p, p)
    return grid.permute(0, 1, 5, 4, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(1, 2)
