"""Public operations: check the arguments, then call the implementation the caller chose.

The formulas, with shapes, are in `reference.py`. There is no fallback: an implementation that does not
exist for an operation raises.
"""

from .attention import attention, norm_rope, qk_norm_rope
from .checks import IMPLEMENTATIONS
from .convolutions import causal_conv3d, upsample_conv2d
from .frames import group_norm_modulate_silu, group_norm_statistics
from .int8_attention import FUSED_HEAD_DIM, int8_attention, qk_norm_rope_int8, quantize_qk, quantized_attention
from .linear import quantize_rows, scaled_linear
from .stream import gated_residual, gated_residual_layer_norm_modulate, layer_norm_modulate

__all__ = [
    "FUSED_HEAD_DIM",
    "IMPLEMENTATIONS",
    "attention",
    "causal_conv3d",
    "gated_residual",
    "gated_residual_layer_norm_modulate",
    "group_norm_modulate_silu",
    "group_norm_statistics",
    "int8_attention",
    "layer_norm_modulate",
    "norm_rope",
    "qk_norm_rope",
    "qk_norm_rope_int8",
    "quantize_qk",
    "quantize_rows",
    "quantized_attention",
    "scaled_linear",
    "upsample_conv2d",
]
