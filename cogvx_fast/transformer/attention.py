"""Attention over the joint `[text; video]` stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from cogvx_kernels import ops
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb

from .. import session
from ..attention.sdpa import with_sums
from ..hooks import is_hooked

if TYPE_CHECKING:
    from .binding import BoundBlock
    from .linear import QuantizedRows

Rotary = tuple[torch.Tensor, torch.Tensor]


class FastCogVideoXAttnProcessor(CogVideoXAttnProcessor2_0):
    """diffusers' processor of this family, with the backend that the generation's plan or the user has named.

    Attributes:
        _attention_backend: what `set_attention_backend()` writes to in every diffusers model.
    """

    def __init__(self) -> None:
        super().__init__()
        self._attention_backend: AttentionBackendName | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention as diffusers calls it, with video and text apart.

        Args:
            hidden_states, encoder_hidden_states: video and text rows `(batch, rows, dim)`.
            attention_mask: as `Attention.prepare_attention_mask` takes it, or None.
            image_rotary_emb: cosines and sines `(tokens, head_dim)` for the video rows, or None.

        Returns:
            Video and text rows of the same shapes.
        """
        bound = session.bound_to(attn)
        if bound is None:
            if self._attention_backend is None:
                return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
            from .binding import BoundBlock

            bound = BoundBlock(by_hand=self._attention_backend)
        text_seq_length = encoder_hidden_states.shape[1]
        stream = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        if attention_mask is not None:
            batch, rows, _ = stream.shape
            attention_mask = attn.prepare_attention_mask(attention_mask, rows, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        output = joint_attention(attn, stream, text_seq_length, image_rotary_emb, bound, attention_mask)
        return output[:, text_seq_length:], output[:, :text_seq_length]


def default_of_diffusers() -> str:
    """The backend that is diffusers' default for all models, where that is another than torch's; else empty.

    Its context manager `attention_backend` makes it so, and `set_attention_backend` of any model. No processor of this
    family follows it upstream, and neither do we: what one model was told would be another's, too.
    """
    backend = AttentionBackendName(_AttentionBackendRegistry._active_backend)
    return "" if backend is AttentionBackendName.NATIVE else backend.value


def joint_attention(
    attn: Attention,
    stream: torch.Tensor | QuantizedRows,
    text_seq_length: int,
    image_rotary_emb: Rotary | None,
    bound: BoundBlock,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Self-attention of the joint stream: LayerNorm of Q and K, RoPE on the video rows, any backend.

    Args:
        stream: `(batch, sequence, dim)`, the first `text_seq_length` rows text; in 8 bits with scales where `bound` has
            products for that.
        attention_mask: additive or boolean, broadcastable to `(batch, heads, sequence, sequence)`, or None.

    Returns:
        `(batch, sequence, dim)`.
    """
    if bound.qkv is not None:
        rows: Any = stream  # of the kind that `bound.qkv` takes
        query, key, value = bound.qkv(rows).unflatten(2, (3, attn.heads, -1)).unbind(2)
    else:
        query, key, value = (
            project(stream).unflatten(2, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
    if attention_mask is None and _norms_write_8_bits(attn, query, bound):
        rotation = (image_rotary_emb, text_seq_length, attn.norm_q.eps)
        quantized = ops.qk_norm_rope_int8(query, key, *_affine(attn), *rotation, impl=bound.operations)
        output = ops.quantized_attention(*quantized, value, **_options(bound), impl=bound.operations).flatten(2)
    else:
        query, key = _qk_norm_rope(attn, query, key, image_rotary_emb, text_seq_length, bound.operations)
        output = _attend(query, key, value, attention_mask, bound).flatten(2)
    return bound.out(output) if bound.out is not None else attn.to_out[1](attn.to_out[0](output))


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, bound: BoundBlock
) -> torch.Tensor:
    """Attention of `(batch, sequence, heads, head_dim)` by the backend that was named or planned."""
    if bound.split is None:
        return _attend_alone(query, key, value, mask, bound)
    if mask is not None:
        raise ValueError("attention_mask cannot be split over processes: leave it out, or EngineConfig.parallel")
    if bound.by_hand is not None and bound.split.ring.size > 1:
        raise ValueError(
            f"set_attention_backend({bound.by_hand.value!r}) cannot work with ParallelConfig.ring: it does not give the"
            " sums of exponentials by which a ring's pieces are put together; ulysses and guidance take any backend"
        )

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return _attend_alone(query, key, value, None, bound)

    return bound.split.attend(query, key, value, attend, with_sums)


def _attend_alone(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, bound: BoundBlock
) -> torch.Tensor:
    """The same of all rows that there are."""
    capability = bound.attention.capability
    if bound.by_hand is not None:
        return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=bound.by_hand)
    direct = capability.dispatch is None
    if direct and mask is None and not torch.is_grad_enabled():  # these know neither masks nor gradients
        if capability.kernel is not None:
            return capability.kernel(query, key, value)
        options = _options(bound) if bound.attention.in_8_bits else {}
        return getattr(ops, capability.operation)(query, key, value, **options, impl=capability.impl)
    if direct or capability.dispatch is AttentionBackendName.NATIVE:
        # By position and name as diffusers' processor of this family calls it: people put their own in its place.
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=0.0, is_causal=False)
        return output.transpose(1, 2)
    return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=capability.dispatch)


def _norms_write_8_bits(attn: Attention, query: torch.Tensor, bound: BoundBlock) -> bool:
    """Whether Q and K go from the projection to 8 bits at once, where attention is in 8 bits."""
    return (
        bound.attention.in_8_bits
        and bound.by_hand is None
        and bound.split is None  # K is smoothed by the mean of all rows
        and bound.operations == bound.attention.capability.impl
        and not torch.is_grad_enabled()
        and query.shape[3] <= ops.FUSED_HEAD_DIM
        and _has_plain_norms(attn)
    )


def _options(bound: BoundBlock) -> dict[str, Any]:
    """Of attention in 8 bits."""
    value = bound.attention.value
    value_dtype = torch.float8_e4m3fn if value.fp8_value else None
    return {"value_dtype": value_dtype, "smooth_value": value.smooth_value, "guard": bound.guard}


def _qk_norm_rope(
    attn: Attention,
    query: torch.Tensor,
    key: torch.Tensor,
    image_rotary_emb: Rotary | None,
    text_seq_length: int,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    if _has_plain_norms(attn):
        return ops.qk_norm_rope(query, key, *_affine(attn), image_rotary_emb, text_seq_length, attn.norm_q.eps, impl)
    query, key = (x if norm is None else norm(x) for norm, x in ((attn.norm_q, query), (attn.norm_k, key)))
    if image_rotary_emb is None:
        return query, key
    return _rotate(query, text_seq_length, image_rotary_emb), _rotate(key, text_seq_length, image_rotary_emb)


def _has_plain_norms(attn: Attention) -> bool:
    """Whether one operation can norm Q and K: it reads both norms' parameters, and has one eps."""
    norms = attn.norm_q, attn.norm_k
    plain = all(type(norm) is torch.nn.LayerNorm and not is_hooked(norm) for norm in norms)
    return plain and attn.norm_q.eps == attn.norm_k.eps


def _affine(
    attn: Attention,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    return attn.norm_q.weight, attn.norm_q.bias, attn.norm_k.weight, attn.norm_k.bias


def _rotate(x: torch.Tensor, text_seq_length: int, image_rotary_emb: Rotary) -> torch.Tensor:
    text, video = x[:, :text_seq_length], x[:, text_seq_length:]
    return torch.cat([text, apply_rotary_emb(video, image_rotary_emb, sequence_dim=1)], dim=1)
