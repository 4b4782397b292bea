"""All Triton operations in one place; importing this imports triton."""

from __future__ import annotations

import torch

from .attention import DTYPES as ATTENTION_DTYPES
from .attention import HEAD_DIMS, attention
from .causal_conv3d import causal_conv3d
from .gated_residual import gated_residual
from .gated_residual_layer_norm_modulate import (
    gated_residual_layer_norm_modulate,
    gated_residual_layer_norm_modulate_kernel,
    gated_residual_layer_norm_modulate_quantized,
)
from .group_norm_modulate_silu import group_norm_modulate_silu
from .group_norm_statistics import group_norm_statistics
from .int8_attention import int8_attention, int8_attention_kernels
from .layer_norm_modulate import layer_norm_modulate, layer_norm_modulate_quantized
from .qk_norm_rope import norm_rope, qk_norm_rope
from .qk_norm_rope_int8 import qk_norm_rope_int8
from .quantize_qk import quantize_qk
from .quantize_rows import quantize_rows
from .quantize_value import quantize_value
from .scaled_linear import scaled_linear, scaled_linear_quantized
from .targets import INTERPRETED, why_not_e4m3
from .upsample_conv2d import upsample_conv2d

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

__all__ = [
    "ATTENTION_DTYPES",
    "DTYPES",
    "HEAD_DIMS",
    "INTERPRETED",
    "attention",
    "causal_conv3d",
    "gated_residual",
    "gated_residual_layer_norm_modulate",
    "gated_residual_layer_norm_modulate_kernel",
    "gated_residual_layer_norm_modulate_quantized",
    "group_norm_modulate_silu",
    "group_norm_statistics",
    "int8_attention",
    "int8_attention_kernels",
    "layer_norm_modulate",
    "layer_norm_modulate_quantized",
    "norm_rope",
    "qk_norm_rope",
    "qk_norm_rope_int8",
    "quantize_qk",
    "quantize_rows",
    "quantize_value",
    "scaled_linear",
    "scaled_linear_quantized",
    "upsample_conv2d",
    "why_not_e4m3",
]
