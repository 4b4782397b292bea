"""A transformer block over one joint `[text; video]` stream, made of a reference block's own modules."""

from __future__ import annotations

import copy
from typing import Any

import torch
from cogvx_kernels import ops
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import nn

from ..hooks import is_hooked
from .attention import JointAttnProcessor, attend
from .modulation import NormModulation
from .plan import UNPLANNED, BlockPlan


class FastCogVideoXBlock(nn.Module):
    """Adopts the children of a `CogVideoXBlock` under the same names: same state dict, same LoRA targets.

    Diffusers' default attention processor is replaced by ours; one that the user set is kept and used. The
    `Attention` itself is a shallow copy for that reason: its projections are shared, its processor is not,
    so the pipeline that the weights came from goes on running its own.
    """

    def __init__(self, reference: CogVideoXBlock):
        super().__init__()
        self.norm1 = reference.norm1
        self.attn1 = copy.copy(reference.attn1)
        if type(self.attn1.processor) is CogVideoXAttnProcessor2_0:
            self.attn1.set_processor(JointAttnProcessor())
        self.norm2 = reference.norm2
        self.ff = reference.ff
        self.train(reference.training)

    def forward(
        self,
        hidden_states: torch.Tensor,
        modulation: tuple[NormModulation, NormModulation],
        text_seq_length: int,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        plan: BlockPlan = UNPLANNED,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: `(batch, sequence, dim)`, the first `text_seq_length` rows text.
            modulation: the vectors of `norm1` and `norm2` for this step.
            image_rotary_emb: cosines and sines for the video rows, or None.
            plan: how the block runs in this generation.

        Returns:
            `(batch, sequence, dim)`.
        """
        first, second = modulation
        normed = _norm_modulate(self.norm1.norm, hidden_states, first, text_seq_length, plan.impl)
        attended = attend(self.attn1, normed, text_seq_length, image_rotary_emb, attention_kwargs, plan)
        norm2 = self.norm2.norm
        if is_hooked(norm2):
            hidden_states = ops.gated_residual(hidden_states, attended, first.gate, text_seq_length, plan.impl)
            normed = _norm_modulate(norm2, hidden_states, second, text_seq_length, plan.impl)
        else:
            hidden_states, normed = ops.gated_residual_layer_norm_modulate(
                hidden_states,
                attended,
                first.gate,
                norm2.weight,
                norm2.bias,
                second.shift,
                second.scale,
                text_seq_length,
                norm2.eps,
                plan.impl,
            )
        forwarded = self.ff(normed) if plan.ff is None else plan.ff(normed)
        return ops.gated_residual(hidden_states, forwarded, second.gate, text_seq_length, plan.impl)


def _norm_modulate(
    norm: nn.LayerNorm, stream: torch.Tensor, modulation: NormModulation, text_seq_length: int, impl: str
) -> torch.Tensor:
    if not is_hooked(norm):
        shift, scale = modulation.shift, modulation.scale
        return ops.layer_norm_modulate(stream, norm.weight, norm.bias, shift, scale, text_seq_length, norm.eps, impl)
    # An offloaded norm has its weights while it is called, and only then.
    normed = norm(stream)
    parts = [normed[:, :text_seq_length], normed[:, text_seq_length:]]
    rows = [(modulation.shift[:, i : i + 1], modulation.scale[:, i : i + 1]) for i in range(2)]
    return torch.cat([part * (1 + scale) + shift for part, (shift, scale) in zip(parts, rows, strict=True)], dim=1)


# First-block caching looks up how a block returns its stream: here as one tensor.
TransformerBlockRegistry.register(FastCogVideoXBlock, TransformerBlockMetadata())
