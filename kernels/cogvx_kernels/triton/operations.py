"""All Triton operations in one place; importing this imports triton."""

from __future__ import annotations

import torch

from .attention import DTYPES as ATTENTION_DTYPES
from .attention import HEAD_DIMS, attention
from .gated_residual import gated_residual
from .gated_residual_layer_norm_modulate import (
    gated_residual_layer_norm_modulate,
    gated_residual_layer_norm_modulate_kernel,
    gated_residual_layer_norm_modulate_quantized,
)
from .layer_norm_modulate import layer_norm_modulate, layer_norm_modulate_quantized
from .qk_norm_rope import norm_rope, qk_norm_rope
from .quantize_rows import quantize_rows
from .scaled_linear import scaled_linear, scaled_linear_quantized
from .targets import INTERPRETED, why_not_e4m3

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

__all__ = [
    "ATTENTION_DTYPES",
    "DTYPES",
    "HEAD_DIMS",
    "INTERPRETED",
    "attention",
    "gated_residual",
    "gated_residual_layer_norm_modulate",
    "gated_residual_layer_norm_modulate_kernel",
    "gated_residual_layer_norm_modulate_quantized",
    "layer_norm_modulate",
    "layer_norm_modulate_quantized",
    "norm_rope",
    "qk_norm_rope",
    "quantize_rows",
    "scaled_linear",
    "scaled_linear_quantized",
    "why_not_e4m3",
]
