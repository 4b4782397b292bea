"""Flash attention on AMX tiles, `attention.cpp`, as an operation of torch."""

from __future__ import annotations

import ctypes
import functools

import torch

from .build import Source

HEAD_DIM = 64
_FEATURES = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16", "amx-tile", "amx-bf16")
_SOURCE = Source("attention.cpp", tuple(f"-m{feature}" for feature in _FEATURES))


@functools.cache
def why_not() -> str | None:
    """What keeps this machine from running the kernel, or None. Compiles it, a second or two, the first time."""
    if not (torch.cpu._is_amx_tile_supported() and torch.cpu._is_avx512_bf16_supported()):
        return "it needs a CPU with AMX and AVX512-BF16"
    if (reason := _SOURCE.why_not()) is not None:
        return reason
    if not _SOURCE.library().cogvx_attention_available():
        return "the operating system does not let processes use AMX"
    return None


@torch.library.custom_op("cogvx_kernels::attention_amx", mutates_args=())
def attention_amx(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """`ops.attention` for bf16 tensors `(batch, sequence, heads, 64)` whose last axis is contiguous."""
    batch, length_q, heads, _ = query.shape
    output = torch.empty(query.shape, dtype=query.dtype)
    if output.numel() == 0:
        return output
    tensors = (query, key, value, output)
    failed = _SOURCE.library().cogvx_attention(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
        *(ctypes.c_int64(size) for size in (batch, length_q, key.shape[1], heads)),
        *((ctypes.c_int64 * 3)(*tensor.stride()[:3]) for tensor in tensors),
        ctypes.c_float(scale),
        ctypes.c_int(torch.get_num_threads()),
    )
    if failed:
        raise MemoryError("attention: no memory for the packed keys and values")
    return output


@attention_amx.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    return query.new_empty(query.shape)
