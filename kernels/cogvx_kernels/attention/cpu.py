"""Flash attention in bf16, `attention.cpp`, on AMX tiles or on vectors of AVX512-BF16, as an operation of torch."""

from __future__ import annotations

import ctypes
import functools

import torch

from .._cpp.arguments import array, operand, sizes, threads
from .._cpp.build import Source

HEAD_DIM = 64
_VECTORS = tuple(f"-mavx512{feature}" for feature in ("f", "bw", "dq", "vl", "bf16"))
# Fastest first. The compiler may use what is named here and no more, so that a source is one of the two.
_SOURCES = {
    "amx": Source.beside(__file__, "attention.cpp", (*_VECTORS, "-mamx-tile", "-mamx-bf16")),
    "avx512": Source.beside(__file__, "attention.cpp", _VECTORS),
}
IMPLEMENTATIONS = tuple(_SOURCES)


@functools.cache
def why_unavailable(impl: str) -> str | None:
    """What keeps this machine from running it by `impl`, one of `IMPLEMENTATIONS`, or None. Compiles it, a second or
    two, the first time."""
    if not torch.cpu._is_avx512_bf16_supported():
        return "it needs a CPU with AVX512-BF16"
    if impl == "amx" and not torch.cpu._is_amx_tile_supported():
        return "it needs a CPU with AMX"
    if (reason := _SOURCES[impl].why_unavailable()) is not None:
        return reason
    if not _SOURCES[impl].library().cogvx_attention_available():
        return "the operating system does not let processes use AMX"
    return None


@torch.library.custom_op("cogvx_kernels::attention_cpu", mutates_args=())
def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, impl: str) -> torch.Tensor:
    """`ops.attention` for bf16 tensors `(batch, sequence, heads, 64)` whose last axis is contiguous."""
    batch, length_q, heads, _ = query.shape
    output = torch.empty(query.shape, dtype=torch.bfloat16, device="cpu")
    rows = (batch, length_q, heads, HEAD_DIM)
    columns = (batch, key.shape[1], heads, HEAD_DIM)
    pointers = (
        operand("query", query, torch.bfloat16, rows, strided=3),
        operand("key", key, torch.bfloat16, columns, strided=3),
        operand("value", value, torch.bfloat16, columns, strided=3),
        operand("output", output, torch.bfloat16, rows),
    )
    if output.numel() == 0:
        return output
    failed = (
        _SOURCES[impl]
        .library()
        .cogvx_attention(
            *pointers,
            *sizes(batch, length_q, key.shape[1], heads),
            *(array(tensor.stride()[:3]) for tensor in (query, key, value, output)),
            ctypes.c_float(scale),
            threads(),
        )
    )
    if failed:
        raise MemoryError("attention: no memory for the packed keys and values")
    return output


@attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, impl: str) -> torch.Tensor:
    return query.new_empty(query.shape)
