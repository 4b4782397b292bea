"""The one door to the operations: each checks its arguments and calls the implementation that the caller chose.

The formulas, with shapes, are in `reference.py` of each operation's folder. There is no fallback: an implementation
that does not exist for an operation raises. Whether one can work here is what `why_unavailable` says.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from . import _triton
from ._cpp.cache import where as compiled_folder
from .adaln import cpu as _adaln
from .adaln import gated_residual, gated_residual_layer_norm_modulate, layer_norm_modulate
from .attention import attention
from .attention import cpu as _attention
from .checks import CPU_DTYPES, IMPLEMENTATIONS, check_impl
from .conv3d import (
    causal_conv3d,
    pack_conv3d,
    packed_conv3d,
    packed_conv3d_size,
    phase_weights,
    upsample_conv2d,
    winograd_pays,
)
from .conv3d import direct as _direct
from .conv3d import winograd as _winograd
from .group_norm import cpu as _group_norm
from .group_norm import group_norm_modulate_silu, group_norm_statistics
from .int8_attention import FUSED_HEAD_DIM, int8_attention, qk_norm_rope_int8, quantize_qk, quantized_attention
from .packed_linear import PACKED_LINEAR_DTYPES, bias_gelu_, pack_linear, packed_linear
from .packed_linear import cpu as _linear
from .qk_norm_rope import cpu as _norm_rope
from .qk_norm_rope import norm_rope, qk_norm_rope
from .w8a8_linear import MAX_INT8_DIM, dequantize, gelu_quantize_rows, int8_products, quantize_rows, scaled_linear
from .w8a8_linear import cpu as _int8

__all__ = [
    "CPU_DTYPES",
    "FUSED_HEAD_DIM",
    "IMPLEMENTATIONS",
    "MAX_INT8_DIM",
    "PACKED_LINEAR_DTYPES",
    "attention",
    "bias_gelu_",
    "causal_conv3d",
    "compiled_folder",
    "dequantize",
    "gated_residual",
    "gated_residual_layer_norm_modulate",
    "gelu_quantize_rows",
    "group_norm_modulate_silu",
    "group_norm_statistics",
    "int8_attention",
    "int8_products",
    "layer_norm_modulate",
    "norm_rope",
    "pack_conv3d",
    "pack_linear",
    "packed_conv3d",
    "packed_conv3d_size",
    "packed_linear",
    "phase_weights",
    "qk_norm_rope",
    "qk_norm_rope_int8",
    "quantize_qk",
    "quantize_rows",
    "quantized_attention",
    "scaled_linear",
    "upsample_conv2d",
    "why_unavailable",
    "winograd_pays",
]

# What C++ needs: a compiler, and for some a CPU that has the instructions.
_ON_CPU: dict[str, dict[str, Callable[[], str | None]]] = {
    "cpu": {
        **dict.fromkeys(
            ("layer_norm_modulate", "gated_residual", "gated_residual_layer_norm_modulate"), _adaln.why_unavailable
        ),
        **dict.fromkeys(("norm_rope", "qk_norm_rope"), _norm_rope.why_unavailable),
        **dict.fromkeys(("group_norm_statistics", "group_norm_modulate_silu"), _group_norm.why_unavailable),
        "packed_linear": _linear.why_unavailable,
        "bias_gelu": _linear.why_no_bias_gelu,
        **dict.fromkeys(("quantize_rows", "int8_products"), _int8.why_unavailable),
    },
    **{impl: {"attention": partial(_attention.why_unavailable, impl)} for impl in _attention.IMPLEMENTATIONS},
    "direct": {"packed_conv3d": _direct.why_unavailable},
    "winograd": {"packed_conv3d": _winograd.why_unavailable},
}


def why_unavailable(operation: str, impl: str, device: torch.device | None = None) -> str | None:
    """What keeps `impl` of an operation from working on this machine, or None. C++ is compiled for it, once a machine.

    Args:
        operation, impl: of `IMPLEMENTATIONS`.
        device: for "triton", the GPU that is asked about; None: any.

    Raises:
        ValueError: for an operation that has no such implementation.
    """
    if operation not in IMPLEMENTATIONS:
        raise ValueError(f"operation={operation!r} is unknown; allowed: {', '.join(map(repr, IMPLEMENTATIONS))}")
    check_impl(operation, impl)
    if impl == "torch":
        return None
    return _triton.why_unavailable(device) if impl == "triton" else _ON_CPU[impl][operation]()
