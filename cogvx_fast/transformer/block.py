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
from .scaled import QuantizedRows, ScaledFeedForward, ScaledLinear


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
        normed = self.enter(hidden_states, modulation[0], text_seq_length, plan)
        arguments = (modulation, text_seq_length, image_rotary_emb, attention_kwargs, plan)
        hidden_states, forwarded = self.run_branches(hidden_states, normed, *arguments)
        return self.leave(hidden_states, forwarded, modulation[1], text_seq_length, plan)

    def enter(
        self, hidden_states: torch.Tensor, modulation: NormModulation, text_seq_length: int, plan: BlockPlan
    ) -> torch.Tensor | QuantizedRows:
        """The stream's first norm, as the projections to Q, K and V take it."""
        norm, dtype = self.norm1.norm, self._entering_dtype(plan)
        return _norm_modulate(norm, hidden_states, modulation, text_seq_length, plan.impl, dtype)

    def enter_after(
        self,
        hidden_states: torch.Tensor,
        forwarded: torch.Tensor,
        gate: torch.Tensor,
        modulation: NormModulation,
        text_seq_length: int,
        plan: BlockPlan,
    ) -> tuple[torch.Tensor, torch.Tensor | QuantizedRows]:
        """`leave` of the block before, whose gate it is, and `enter` of this one: the stream and its norm."""
        norm, dtype = self.norm1.norm, self._entering_dtype(plan)
        parts = (hidden_states, forwarded, gate, modulation)
        return _add_norm_modulate(norm, *parts, text_seq_length, plan.impl, dtype)

    def run_branches(
        self,
        hidden_states: torch.Tensor,
        normed: torch.Tensor | QuantizedRows,
        modulation: tuple[NormModulation, NormModulation],
        text_seq_length: int,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None,
        attention_kwargs: dict[str, Any] | None,
        plan: BlockPlan,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention and feed-forward: the stream, and what the latter adds to it, both `(batch, sequence, dim)`."""
        first, second = modulation
        attended = attend(self.attn1, normed, text_seq_length, image_rotary_emb, attention_kwargs, plan)
        dtype = plan.ff.dtype if isinstance(plan.ff, ScaledFeedForward) else None
        parts = (hidden_states, attended, first.gate, second)
        hidden_states, normed = _add_norm_modulate(self.norm2.norm, *parts, text_seq_length, plan.impl, dtype)
        return hidden_states, self.ff(normed) if plan.ff is None else plan.ff(normed)

    def leave(
        self,
        hidden_states: torch.Tensor,
        forwarded: torch.Tensor,
        modulation: NormModulation,
        text_seq_length: int,
        plan: BlockPlan,
    ) -> torch.Tensor:
        """The stream with what the feed-forward adds."""
        return ops.gated_residual(hidden_states, forwarded, modulation.gate, text_seq_length, plan.impl)

    def _entering_dtype(self, plan: BlockPlan) -> torch.dtype | None:
        """Of 8-bit numbers, where the projections take them and no hook and no foreign processor stands before them."""
        is_ours = isinstance(self.attn1.processor, JointAttnProcessor) and not plan.hooked
        return plan.qkv.dtype if is_ours and isinstance(plan.qkv, ScaledLinear) else None


def _norm_modulate(
    norm: nn.LayerNorm,
    stream: torch.Tensor,
    modulation: NormModulation,
    text_seq_length: int,
    impl: str,
    dtype: torch.dtype | None = None,
) -> torch.Tensor | QuantizedRows:
    """The norm and its modulation; in 8 bits of `dtype` if that is given and the norm is not hooked."""
    if not is_hooked(norm):
        vectors = (norm.weight, norm.bias, modulation.shift, modulation.scale)
        normed = ops.layer_norm_modulate(stream, *vectors, text_seq_length, norm.eps, impl, dtype)
        return normed if dtype is None else QuantizedRows(*normed)
    # An offloaded norm has its weights while it is called, and only then.
    normed = norm(stream)
    parts = [normed[:, :text_seq_length], normed[:, text_seq_length:]]
    rows = [(modulation.shift[:, i : i + 1], modulation.scale[:, i : i + 1]) for i in range(2)]
    return torch.cat([part * (1 + scale) + shift for part, (shift, scale) in zip(parts, rows, strict=True)], dim=1)


def _add_norm_modulate(
    norm: nn.LayerNorm,
    stream: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    modulation: NormModulation,
    text_seq_length: int,
    impl: str,
    dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor | QuantizedRows]:
    """The stream with `gate * branch`, and `_norm_modulate` of that."""
    if is_hooked(norm):
        stream = ops.gated_residual(stream, branch, gate, text_seq_length, impl)
        return stream, _norm_modulate(norm, stream, modulation, text_seq_length, impl)
    vectors = (gate, norm.weight, norm.bias, modulation.shift, modulation.scale)
    stream, *normed = ops.gated_residual_layer_norm_modulate(
        stream, branch, *vectors, text_seq_length, norm.eps, impl, dtype
    )
    return stream, normed[0] if dtype is None else QuantizedRows(*normed)


# First-block caching looks up how a block returns its stream: here as one tensor.
TransformerBlockRegistry.register(FastCogVideoXBlock, TransformerBlockMetadata())
