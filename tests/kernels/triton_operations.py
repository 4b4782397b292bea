"""Triton's operations by name, and what tests put in the place of one."""

from collections.abc import Callable

import pytest
from cogvx_kernels import adaln, attention, conv3d, group_norm, int8_attention, qk_norm_rope, w8a8_linear

MODULES = {
    **dict.fromkeys(("layer_norm_modulate", "gated_residual", "gated_residual_layer_norm_modulate"), adaln.gpu),
    **dict.fromkeys(("norm_rope", "qk_norm_rope"), qk_norm_rope.gpu),
    "attention": attention.gpu,
    "quantize_qk": int8_attention.qk,
    "qk_norm_rope_int8": int8_attention.rope,
    "quantize_value": int8_attention.values,
    "int8_attention": int8_attention.gpu,
    "quantize_rows": w8a8_linear.rows,
    "scaled_linear": w8a8_linear.gpu,
    "group_norm_statistics": group_norm.statistics,
    "group_norm_modulate_silu": group_norm.gpu,
    "causal_conv3d": conv3d.gpu,
    "upsample_conv2d": conv3d.upsample,
}


def operation(name: str) -> Callable:
    return getattr(MODULES[name], name)


def watch(monkeypatch: pytest.MonkeyPatch, name: str, seen: Callable) -> None:
    """`seen` is called with the arguments of each call of an operation, before it."""
    own = operation(name)

    def call(*arguments):
        seen(*arguments)
        return own(*arguments)

    monkeypatch.setattr(MODULES[name], name, call)
