"""The operation of `norm_rope.cpp` as one of torch."""

from __future__ import annotations

import ctypes

import torch

from .._cpp.arguments import affine, array, operand, optional, sizes, threads
from .._cpp.build import REORDERED, Source
from ..checks import CPU_DTYPES

_SOURCE = Source.beside(__file__, "norm_rope.cpp", REORDERED)
why_unavailable = _SOURCE.why_unavailable


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
    head_dim, rotated = x.shape[3], x.shape[1] - text_length
    if (cosines is None) != (sines is None) or (cosines is not None and head_dim % 2):
        raise ValueError(f"norm_rope rotates an even head dim by cosines and sines, got {head_dim} and one without")
    heads = operand("x", x, CPU_DTYPES, x.shape, strided=3)
    output = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    _SOURCE.function("norm_rope", x.dtype)(
        heads,
        array(x.stride()[:3]),
        *affine(x, weight, bias),
        optional("cosines", cosines, torch.float32, (rotated, head_dim)),
        optional("sines", sines, torch.float32, (rotated, head_dim)),
        *sizes(*x.shape, text_length),
        ctypes.c_float(eps),
        operand("output", output, x.dtype, x.shape),
        threads(),
    )
    return output


norm_rope.register_fake(lambda x, *_, **__: x.new_empty(x.shape))
