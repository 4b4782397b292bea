"""A transformer block over one joint `[text; video]` stream, made of a reference block's own modules."""

from __future__ import annotations

import copy
from typing import Any

import torch
from cogvx_kernels import ops
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import nn

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
        norm1, norm2 = self.norm1.norm, self.norm2.norm
        normed = ops.layer_norm_modulate(
            hidden_states, norm1.weight, norm1.bias, first.shift, first.scale, text_seq_length, norm1.eps, plan.impl
        )
        attended = attend(self.attn1, normed, text_seq_length, image_rotary_emb, attention_kwargs, plan)
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
        forwarded = self.ff(normed) if plan.ff is None else plan.ff[1](plan.ff[0](normed))
        return ops.gated_residual(hidden_states, forwarded, second.gate, text_seq_length, plan.impl)
