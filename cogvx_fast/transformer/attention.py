"""Attention over the joint stream."""

from __future__ import annotations

from typing import Any

import torch
from cogvx_kernels import ops
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb

from ..attention.backends import CAPABILITIES, Capability
from ..config import AttentionBackend
from ..hooks import is_hooked
from ..quantization.recipes import QuantizedAttention
from .plan import UNPLANNED, BlockPlan
from .scaled import QuantizedRows


class JointAttnProcessor:
    """Self-attention of the `[text; video]` stream: LayerNorm of Q and K, RoPE on the video rows, any backend.

    Attributes:
        backend: the engine's choice.
        scheme: how attention in 8 bits treats V, where `backend` is that.
        guard: int32 of one element, which attention in 8 bits sets to 1 if a number of its output is not finite; None:
            nobody looks.
        _attention_backend: what `set_attention_backend()` writes to in every diffusers model; wins over the default.
    """

    def __init__(self) -> None:
        self.backend: Capability = CAPABILITIES[AttentionBackend.SDPA]
        self.scheme = QuantizedAttention()
        self.guard: torch.Tensor | None = None
        self._attention_backend: AttentionBackendName | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor | QuantizedRows,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        text_seq_length: int = 0,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        plan: BlockPlan = UNPLANNED,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: `(batch, sequence, dim)`, the first `text_seq_length` rows text; in 8 bits with scales where
                `plan` has products for that.
            encoder_hidden_states: unused, there for the signature that `Attention` calls.
            attention_mask: additive or boolean, broadcastable to `(batch, heads, sequence, sequence)`, or None.
            image_rotary_emb: cosines and sines `(tokens, head_dim)` for the video rows, or None.

        Returns:
            `(batch, sequence, dim)`.
        """
        if plan.qkv is not None:
            query, key, value = plan.qkv(hidden_states).unflatten(2, (3, attn.heads, -1)).unbind(2)
        else:
            query, key, value = (
                project(hidden_states).unflatten(2, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
            )
        if self._quantizes_with_norms(attn, query, attention_mask, plan):
            rotation = (image_rotary_emb, text_seq_length, attn.norm_q.eps)
            quantized = ops.qk_norm_rope_int8(query, key, *_affine(attn), *rotation, impl=plan.impl)
            output = ops.quantized_attention(*quantized, value, **self._options(), impl=plan.impl).flatten(2)
        else:
            query, key = _qk_norm_rope(attn, query, key, image_rotary_emb, text_seq_length, plan.impl)
            output = self._attend(query, key, value, attention_mask).flatten(2)
        return plan.out(output) if plan.out is not None else attn.to_out[1](attn.to_out[0](output))

    def _quantizes_with_norms(
        self, attn: Attention, query: torch.Tensor, mask: torch.Tensor | None, plan: BlockPlan
    ) -> bool:
        """Whether Q and K go from the projection to 8 bits at once, where attention is in 8 bits."""
        return (
            self.backend.operation == "int8_attention"
            and self._attention_backend is None
            and plan.impl == self.backend.impl
            and mask is None
            and not torch.is_grad_enabled()
            and query.shape[3] <= ops.FUSED_HEAD_DIM
            and _has_plain_norms(attn)
        )

    def _options(self) -> dict[str, Any]:
        """Of attention in 8 bits."""
        value_dtype = torch.float8_e4m3fn if self.scheme.fp8_value else None
        return {"value_dtype": value_dtype, "smooth_value": self.scheme.smooth_value, "guard": self.guard}

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        chosen = self._attention_backend or self.backend.dispatch
        if chosen is None and mask is None and not torch.is_grad_enabled():
            options = self._options() if self.backend.operation == "int8_attention" else {}
            return getattr(ops, self.backend.operation)(query, key, value, **options, impl=self.backend.impl)
        # Our kernels know neither masks nor gradients.
        return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=chosen or AttentionBackendName.NATIVE)


def _qk_norm_rope(
    attn: Attention,
    query: torch.Tensor,
    key: torch.Tensor,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None,
    text_seq_length: int,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not _has_plain_norms(attn):
        return tuple(
            _norm_rope(norm, x, image_rotary_emb, text_seq_length, impl)
            for norm, x in ((attn.norm_q, query), (attn.norm_k, key))
        )
    return ops.qk_norm_rope(query, key, *_affine(attn), image_rotary_emb, text_seq_length, attn.norm_q.eps, impl)


def _has_plain_norms(attn: Attention) -> bool:
    """Whether one operation can norm Q and K: it reads both norms' parameters, and has one eps."""
    norms = attn.norm_q, attn.norm_k
    return not any(norm is None or is_hooked(norm) for norm in norms) and attn.norm_q.eps == attn.norm_k.eps


def _affine(attn: Attention) -> list[torch.Tensor | None]:
    return [parameter for norm in (attn.norm_q, attn.norm_k) for parameter in (norm.weight, norm.bias)]


def _norm_rope(
    norm: torch.nn.LayerNorm | None,
    x: torch.Tensor,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None,
    text_seq_length: int,
    impl: str,
) -> torch.Tensor:
    if norm is None or is_hooked(norm):  # an offloaded norm has its weights only while it is called
        x = x if norm is None else norm(x)
        return x if image_rotary_emb is None else _rotate_video(x, text_seq_length, image_rotary_emb)
    return ops.norm_rope(x, norm.weight, norm.bias, image_rotary_emb, text_seq_length, norm.eps, impl)


def _rotate_video(
    x: torch.Tensor, text_seq_length: int, image_rotary_emb: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    text, video = x[:, :text_seq_length], x[:, text_seq_length:]
    return torch.cat([text, apply_rotary_emb(video, image_rotary_emb, sequence_dim=1)], dim=1)


def attend(
    attn: Attention,
    stream: torch.Tensor | QuantizedRows,
    text_seq_length: int,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None,
    attention_kwargs: dict | None,
    plan: BlockPlan = UNPLANNED,
) -> torch.Tensor:
    """Attention of the joint stream by whichever processor is set.

    Any processor written for diffusers' CogVideoX works: it is called the way diffusers calls it, with the
    stream split, and its two results are joined again.
    """
    kwargs = attention_kwargs or {}
    if isinstance(attn.processor, JointAttnProcessor):
        return attn(stream, text_seq_length=text_seq_length, image_rotary_emb=image_rotary_emb, plan=plan, **kwargs)
    video, text = attn(
        hidden_states=stream[:, text_seq_length:],
        encoder_hidden_states=stream[:, :text_seq_length],
        image_rotary_emb=image_rotary_emb,
        **kwargs,
    )
    return torch.cat([text, video], dim=1)
