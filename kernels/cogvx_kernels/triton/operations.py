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
)
from .group_norm_modulate_silu import group_norm_modulate_silu
from .group_norm_statistics import group_norm_statistics
from .layer_norm_modulate import layer_norm_modulate
from .qk_norm_rope import norm_rope, qk_norm_rope
from .targets import INTERPRETED
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
    "group_norm_modulate_silu",
    "group_norm_statistics",
    "layer_norm_modulate",
    "norm_rope",
    "qk_norm_rope",
    "upsample_conv2d",
]
