"""A transformer block over one joint `[text; video]` stream, made of a reference block's own modules."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from cogvx_kernels import ops
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0
from diffusers.models.normalization import CogVideoXLayerNormZero
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

from .. import session
from ..hooks import without_hooks
from .attention import FastCogVideoXAttnProcessor, Rotary, joint_attention
from .binding import BoundBlock
from .linear import QuantizedRows
from .modulation import NormModulation

Norms = tuple[NormModulation, NormModulation]  # of a block's first norm and its second


class FastCogVideoXBlock(CogVideoXBlock):
    """A `CogVideoXBlock` on the reference's own children, under the same names: same state dict, same LoRA targets.

    Called, it takes and gives what diffusers' block does, so whatever was written for that works: caches, hooks, other
    people's loops. A generation calls `branches` instead, with what stands before and behind it joined to its
    neighbours'.

    Diffusers' default attention processor is replaced by ours; one that the user set is kept and used. The
    `Attention` itself is a shallow copy for that reason: its projections are shared, its processor is not,
    so the pipeline that the weights came from goes on running its own.
    """

    @classmethod
    def adopt(cls, reference: CogVideoXBlock) -> FastCogVideoXBlock:
        """A block of the same modules; forward hooks that torch knows come along."""
        block = cls.__new__(cls)
        block.__dict__ = without_hooks(reference)
        attention = copy.copy(reference.attn1)
        attention.__dict__ = without_hooks(reference.attn1)
        if type(attention.processor) is CogVideoXAttnProcessor2_0:
            attention.processor = FastCogVideoXAttnProcessor()
        block._modules = {**reference._modules, "attn1": attention}
        return block

    @functools.wraps(CogVideoXBlock.forward)
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Rotary | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        bound = session.bound_to(self)
        if bound is None or not bound.fused:
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_kwargs)
        text_seq_length = encoder_hidden_states.shape[1]
        stream = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        norms = NormModulation.project(self.norm1, temb), NormModulation.project(self.norm2, temb)
        stream = self.whole(stream, norms, text_seq_length, image_rotary_emb, attention_kwargs, bound)
        return stream[:, text_seq_length:], stream[:, :text_seq_length]

    def whole(
        self,
        stream: torch.Tensor,
        norms: Norms,
        text_seq_length: int,
        image_rotary_emb: Rotary | None,
        attention_kwargs: dict[str, Any] | None,
        bound: BoundBlock,
    ) -> torch.Tensor:
        """The block alone: stream in, stream out, both `(batch, sequence, dim)`."""
        stream, normed = residual_norm(
            stream, None, None, self.norm1, norms[0], text_seq_length, bound.operations, bound.norm1_dtype
        )
        stream, branch = self.branches(
            stream, normed, norms, text_seq_length, image_rotary_emb, attention_kwargs, bound
        )
        return ops.gated_residual(stream, branch, norms[1].gate, text_seq_length, bound.operations)

    def branches(
        self,
        stream: torch.Tensor,
        normed: torch.Tensor | QuantizedRows,
        norms: Norms,
        text_seq_length: int,
        image_rotary_emb: Rotary | None,
        attention_kwargs: dict[str, Any] | None,
        bound: BoundBlock,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention added to the stream, and the feed-forward, which is still to be added by the second norm's gate.

        Args:
            stream: `(batch, sequence, dim)`, the first `text_seq_length` rows text.
            normed: its first norm, as the projections to Q, K and V take it.
            norms: the vectors of `norm1` and `norm2` for this step.
            image_rotary_emb: cosines and sines for the video rows, or None.
            bound: how the block runs in this generation.

        Returns:
            The stream and the branch, both `(batch, sequence, dim)`.
        """
        attended = _attended(self.attn1, normed, text_seq_length, image_rotary_emb, attention_kwargs, bound)
        stream, normed = residual_norm(
            stream, attended, norms[0].gate, self.norm2, norms[1], text_seq_length, bound.operations, bound.norm2_dtype
        )
        rows: Any = normed  # of the kind that `bound.ff` takes
        return stream, self.ff(rows) if bound.ff is None else bound.ff(rows)


def residual_norm(
    stream: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    norm: CogVideoXLayerNormZero,
    modulation: NormModulation,
    text_seq_length: int,
    operations: str,
    quantize: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | QuantizedRows]:
    """`stream + gate * branch`, and the modulated norm of that; without a branch the stream as it is.

    Args:
        norm: a `CogVideoXLayerNormZero`, of which the inner LayerNorm counts.
        quantize: write the norm in 8 bits of this dtype.
    """
    inner = norm.norm
    vectors = (inner.weight, inner.bias, modulation.shift, modulation.scale, text_seq_length, inner.eps)
    if branch is None:
        normed: Any = ops.layer_norm_modulate(stream, *vectors, operations, quantize)
        return stream, normed if quantize is None else QuantizedRows(*normed)
    assert gate is not None
    stream, *rest = ops.gated_residual_layer_norm_modulate(stream, branch, gate, *vectors, operations, quantize)
    return stream, rest[0] if quantize is None else QuantizedRows(*rest)


def _attended(
    attn: Attention,
    normed: torch.Tensor | QuantizedRows,
    text_seq_length: int,
    image_rotary_emb: Rotary | None,
    attention_kwargs: dict[str, Any] | None,
    bound: BoundBlock,
) -> torch.Tensor:
    """Attention of the joint stream, by our formula or, where something hangs on it, as diffusers calls it."""
    if bound.attends:
        return joint_attention(attn, normed, text_seq_length, image_rotary_emb, bound)
    rows: Any = normed  # a tensor: norms write 8 bits for our formula alone
    video, text = attn(
        hidden_states=rows[:, text_seq_length:],
        encoder_hidden_states=rows[:, :text_seq_length],
        image_rotary_emb=image_rotary_emb,
        **(attention_kwargs or {}),
    )
    return torch.cat([text, video], dim=1)


# Caches look up how a block returns its streams: as diffusers' own does.
TransformerBlockRegistry.register(
    FastCogVideoXBlock,
    TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=1),
)
