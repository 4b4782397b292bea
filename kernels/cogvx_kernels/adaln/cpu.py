"""The operations of `adaln.cpp` as operations of torch."""

from __future__ import annotations

import ctypes

import torch

from .._cpp.arguments import NULL, affine, array, operand, optional, sizes, threads
from .._cpp.build import REORDERED, Source
from ..checks import CPU_DTYPES

_SOURCE = Source.beside(__file__, "adaln.cpp", REORDERED)
why_unavailable = _SOURCE.why_unavailable


def _vectors(name: str, vectors: torch.Tensor, x: torch.Tensor) -> tuple[ctypes.c_void_p, ctypes.Array]:
    """Pointer and strides of `(1 or batch, 2, dim)`; one row for all has stride 0."""
    batch = x.shape[0] if vectors.shape[0] > 1 else 1
    strides = (vectors.stride(0) if batch > 1 else 0, vectors.stride(1))
    return operand(name, vectors, x.dtype, (batch, 2, x.shape[2]), strided=2), array(strides)


def _layer_norm_modulate(
    x: torch.Tensor,
    gated: torch.Tensor | None,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    text_length: int,
    eps: float,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The norm of `x + gate * gated`, and that sum; without `gated`, of `x`."""
    stream = operand("x", x, CPU_DTYPES, x.shape)
    residual, normed = None if gated is None else torch.empty_like(x), torch.empty_like(x)
    _SOURCE.function("layer_norm_modulate", x.dtype)(
        stream,
        optional("y", gated, x.dtype, x.shape),
        *((NULL, array((0, 0))) if gate is None else _vectors("gate", gate, x)),
        *affine(x, weight, bias),
        *_vectors("shift", shift, x),
        *_vectors("scale", scale, x),
        *sizes(*x.shape, text_length),
        ctypes.c_float(eps),
        optional("residual", residual, x.dtype, x.shape),
        operand("normed", normed, x.dtype, x.shape),
        threads(),
    )
    return residual, normed


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
    return _layer_norm_modulate(x, None, None, weight, bias, shift, scale, text_length, eps)[1]


@torch.library.custom_op("cogvx_kernels::gated_residual_cpu", mutates_args=())
def gated_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, text_length: int) -> torch.Tensor:
    """`ops.gated_residual`."""
    stream = operand("x", x, CPU_DTYPES, x.shape)
    output = torch.empty_like(x)
    _SOURCE.function("gated_residual", x.dtype)(
        stream,
        operand("y", y, x.dtype, x.shape),
        *_vectors("gate", gate, x),
        *sizes(*x.shape, text_length),
        operand("output", output, x.dtype, x.shape),
        threads(),
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
    residual, normed = _layer_norm_modulate(x, y, gate, weight, bias, shift, scale, text_length, eps)
    assert residual is not None
    return residual, normed


layer_norm_modulate.register_fake(lambda x, *_, **__: torch.empty_like(x))
gated_residual.register_fake(lambda x, *_, **__: torch.empty_like(x))
gated_residual_layer_norm_modulate.register_fake(lambda x, *_, **__: (torch.empty_like(x), torch.empty_like(x)))
