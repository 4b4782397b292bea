"""AdaLN's shift, scale and gate of every layer, for all steps of a generation at once.

They depend on the timestep alone (and on I2V-1.5's `ofs`, a constant), so what diffusers computes
twice per layer and step is one small GEMM per norm and generation. The table of CogVideoX-2b for 50
steps takes 50 x 30 x 12 x 1920 x 2 bytes = 69 MB in fp16; the projections it replaces hold 0.71 GB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.models.normalization import AdaLayerNorm, CogVideoXLayerNormZero
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock


@dataclass
class NormModulation:
    """One norm's vectors, each `(steps or batch, 2, dim)`: text expert at index 0, video expert at 1."""

    shift: torch.Tensor
    scale: torch.Tensor
    gate: torch.Tensor

    @classmethod
    def project(cls, norm: CogVideoXLayerNormZero, temb: torch.Tensor) -> NormModulation:
        """The modulation that a `CogVideoXLayerNormZero` makes of time embeddings `(rows, time_embed_dim)`."""
        projected = norm.linear(norm.silu(temb)).unflatten(1, (2, 3, -1))  # (rows, video|text, shift|scale|gate, dim)
        shift, scale, gate = projected.flip(1).unbind(2)
        return cls(shift, scale, gate)

    def __getitem__(self, rows: slice) -> NormModulation:
        return NormModulation(self.shift[rows], self.scale[rows], self.gate[rows])


@dataclass
class Modulation:
    """All norms' vectors: `blocks[layer] = (norm1, norm2)`, and the final norm's shift and scale `(rows, 1, dim)`."""

    blocks: list[tuple[NormModulation, NormModulation]]
    final_shift: torch.Tensor
    final_scale: torch.Tensor

    @classmethod
    def compute(cls, blocks: Sequence[CogVideoXBlock], norm_out: AdaLayerNorm | None, temb: torch.Tensor) -> Modulation:
        """The modulation of time embeddings `(rows, time_embed_dim)`: a row for each step, or sample of a batch.

        Args:
            norm_out: the final norm; None: it is called itself.
        """
        of_blocks = [
            (NormModulation.project(block.norm1, temb), NormModulation.project(block.norm2, temb)) for block in blocks
        ]
        if norm_out is None:
            nothing = temb.new_empty(len(temb), 1, 0)
            return cls(of_blocks, nothing, nothing)
        shift, scale = norm_out.linear(norm_out.silu(temb)).unsqueeze(1).chunk(2, dim=2)
        return cls(of_blocks, shift, scale)

    def row(self, index: int) -> Modulation:
        """The vectors of one step as views, with a leading axis of one that broadcasts over the batch."""
        rows = slice(index, index + 1)
        return Modulation(
            [(norm1[rows], norm2[rows]) for norm1, norm2 in self.blocks], self.final_shift[rows], self.final_scale[rows]
        )
