"""The operations of `stream.cpp`, which stand between the matrix products of a block, as operations of torch."""

from __future__ import annotations

import ctypes

import torch

from .arguments import pointer, sizes, threads
from .build import REORDERED, Source

DTYPES = (torch.bfloat16, torch.float32)
_SOURCE = Source("stream.cpp", REORDERED)
why_not = _SOURCE.why_not


def _vectors(vectors: torch.Tensor | None) -> tuple[ctypes.c_void_p, ctypes.Array]:
    """Pointer and strides of `(1 or batch, 2, dim)`; one row for all has stride 0."""
    strides = (0, 0) if vectors is None else (vectors.stride(0) if vectors.shape[0] > 1 else 0, vectors.stride(1))
    return pointer(vectors), (ctypes.c_int64 * 2)(*strides)


@torch.library.custom_op("cogvx_kernels::layer_norm_modulate_cpu", mutates_args=())
def layer_norm_modulate(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    text_length: int,
    eps: float,
) -> torch.Tensor:
    """`ops.layer_norm_modulate`."""
    normed = torch.empty_like(x)
    _SOURCE.function("layer_norm_modulate", x.dtype)(
        pointer(x),
        pointer(None),
        *_vectors(None),
        pointer(weight),
        pointer(bias),
        *_vectors(shift),
        *_vectors(scale),
        *sizes(*x.shape, text_length),
        ctypes.c_float(eps),
        pointer(None),
        pointer(normed),
        threads(),
    )
    return normed


@torch.library.custom_op("cogvx_kernels::gated_residual_cpu", mutates_args=())
def gated_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, text_length: int) -> torch.Tensor:
    """`ops.gated_residual`."""
    output = torch.empty_like(x)
    _SOURCE.function("gated_residual", x.dtype)(
        pointer(x), pointer(y), *_vectors(gate), *sizes(*x.shape, text_length), pointer(output), threads()
    )
    return output


@torch.library.custom_op("cogvx_kernels::gated_residual_layer_norm_modulate_cpu", mutates_args=())
def gated_residual_layer_norm_modulate(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    text_length: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.gated_residual_layer_norm_modulate`."""
    residual, normed = torch.empty_like(x), torch.empty_like(x)
    _SOURCE.function("layer_norm_modulate", x.dtype)(
        pointer(x),
        pointer(y),
        *_vectors(gate),
        pointer(weight),
        pointer(bias),
        *_vectors(shift),
        *_vectors(scale),
        *sizes(*x.shape, text_length),
        ctypes.c_float(eps),
        pointer(residual),
        pointer(normed),
        threads(),
    )
    return residual, normed


@torch.library.custom_op("cogvx_kernels::norm_rope_cpu", mutates_args=())
def norm_rope(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    cosines: torch.Tensor | None,
    sines: torch.Tensor | None,
    text_length: int,
    eps: float,
) -> torch.Tensor:
    """LayerNorm over the last axis of `(batch, sequence, heads, head_dim)`, rotated past `text_length`; contiguous."""
    output = torch.empty(x.shape, dtype=x.dtype)
    _SOURCE.function("norm_rope", x.dtype)(
        pointer(x),
        (ctypes.c_int64 * 3)(*x.stride()[:3]),
        *(pointer(tensor) for tensor in (weight, bias, cosines, sines)),
        *sizes(*x.shape, text_length),
        ctypes.c_float(eps),
        pointer(output),
        threads(),
    )
    return output


@torch.library.custom_op("cogvx_kernels::bias_gelu_cpu", mutates_args=("x",))
def bias_gelu_(x: torch.Tensor, bias: torch.Tensor) -> None:
    """`x = gelu(x + bias)` in its tanh form, in place; fp32, `x` `(rows, dim)` contiguous, `bias` `(dim,)`."""
    _SOURCE.function("bias_gelu", x.dtype)(pointer(x), pointer(bias), *sizes(*x.shape), threads())


bias_gelu_.register_fake(lambda x, bias: None)
layer_norm_modulate.register_fake(lambda x, *_, **__: torch.empty_like(x))
gated_residual.register_fake(lambda x, *_, **__: torch.empty_like(x))
gated_residual_layer_norm_modulate.register_fake(lambda x, *_, **__: (torch.empty_like(x), torch.empty_like(x)))
norm_rope.register_fake(lambda x, *_, **__: x.new_empty(x.shape))
