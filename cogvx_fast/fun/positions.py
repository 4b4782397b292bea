"""Positions of CogVideoX-Fun-2b: where other checkpoints compute them for a size, it stretches the table of its own.

At 384x672 the two differ by 27%, so that diffusers' transformer is off at every size but 480x720. The 5b and 1.5
checkpoints have rotary positions, which are the same in both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import CogVideoXPatchEmbed

_STRETCHES: ContextVar[bool] = ContextVar("cogvx_fast_fun_positions", default=False)


class FunPatchEmbed(CogVideoXPatchEmbed):
    """diffusers' class, whose positions are stretched inside of `stretched`, and its own elsewhere."""

    def _get_positional_embeddings(
        self, sample_height: int, sample_width: int, sample_frames: int, device: torch.device | None = None
    ) -> torch.Tensor:
        if not _STRETCHES.get():
            return super()._get_positional_embeddings(sample_height, sample_width, sample_frames, device)
        frames = (sample_frames - 1) // self.temporal_compression_ratio + 1
        p = self.patch_size
        return stretch(self, frames, sample_height // p, sample_width // p).to(device)


def stretch(patch_embed: CogVideoXPatchEmbed, frames: int, rows: int, columns: int) -> torch.Tensor:
    """The table of a patch embedding for another grid of tokens, `(1, text tokens + frames * rows * columns, dim)`.

    Rows and columns are interpolated; time is cut off.

    Raises:
        ValueError: for more frames than the table has.
    """
    text, p = patch_embed.max_text_seq_length, patch_embed.patch_size
    of_time = (patch_embed.sample_frames - 1) // patch_embed.temporal_compression_ratio + 1
    if frames > of_time:
        raise ValueError(
            f"num_frames={(frames - 1) * patch_embed.temporal_compression_ratio + 1} is more than this checkpoint has"
            f" positions for; must be at most {patch_embed.sample_frames}"
        )
    grid = (of_time, patch_embed.sample_height // p, patch_embed.sample_width // p)
    table = patch_embed.pos_embedding[:, text:].unflatten(1, grid).movedim(-1, 1)  # (1, dim, time, rows, columns)
    table = F.interpolate(table, size=(of_time, rows, columns), mode="trilinear", align_corners=False)
    video = table[:, :, :frames].flatten(2).transpose(1, 2)
    return torch.cat([patch_embed.pos_embedding[:, :text], video], dim=1)


@contextlib.contextmanager
def stretched(patch_embed: CogVideoXPatchEmbed) -> Iterator[None]:
    """Within the block, on this thread, positions that are added are stretched."""
    if type(patch_embed) is CogVideoXPatchEmbed:
        patch_embed.__class__ = FunPatchEmbed  # which does as before elsewhere
    token = _STRETCHES.set(True)
    try:
        yield
    finally:
        _STRETCHES.reset(token)
