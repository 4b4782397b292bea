"""What all operations check before they compute: implementations, layouts, dtypes."""

from __future__ import annotations

import torch

from ..cpu import attention
from ..cpu import frames as cpu_frames
from ..cpu import stream as cpu
from ..reference import QUANTIZED_MAXIMUM
from ..triton import why_unavailable as why_not_triton

if why_not_triton() is None:
    from ..triton import operations as gpu
else:
    gpu = None  # type: ignore[assignment]  # mypy has no optional modules


# What each operation can be computed by. "cpu" is C++, if `why_unavailable()` of `cpu.stream` or `cpu.frames` is None;
# "amx" and "avx512" likewise, of `cpu.attention`; "triton" for `triton.why_unavailable()` None and tensors on a GPU.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "layer_norm_modulate": ("torch", "cpu", "triton"),
    "gated_residual": ("torch", "cpu", "triton"),
    "gated_residual_layer_norm_modulate": ("torch", "cpu", "triton"),
    "norm_rope": ("torch", "cpu", "triton"),
    "qk_norm_rope": ("torch", "cpu", "triton"),
    "attention": ("torch", *attention.IMPLEMENTATIONS, "triton"),
    "group_norm_statistics": ("torch", "cpu", "triton"),
    "group_norm_modulate_silu": ("torch", "cpu", "triton"),
    "causal_conv3d": ("torch", "triton"),
    "upsample_conv2d": ("torch", "triton"),
    "quantize_rows": ("torch", "triton"),
    "scaled_linear": ("torch", "triton"),
    "quantize_qk": ("torch", "triton"),
    "qk_norm_rope_int8": ("torch", "triton"),
    "quantized_attention": ("torch", "triton"),
    "int8_attention": ("torch", "triton"),
}


def check_impl(operation: str, impl: str) -> None:
    allowed = IMPLEMENTATIONS[operation]
    if impl not in allowed:
        raise ValueError(f"impl={impl!r} is unknown to {operation}; allowed: {', '.join(map(repr, allowed))}")


def check_stream(operation: str, x: torch.Tensor, text_length: int) -> None:
    if x.ndim != 3:
        raise ValueError(f"{operation}: x must be (batch, sequence, dim), got shape {tuple(x.shape)}")
    if not 0 <= text_length <= x.shape[1]:
        raise ValueError(f"{operation}: text_length={text_length} must lie in 0..{x.shape[1]}, the sequence length")


def check_expert_vectors(operation: str, x: torch.Tensor, **vectors: torch.Tensor) -> None:
    for name, vector in vectors.items():
        if vector.ndim != 3 or vector.shape[0] not in (1, x.shape[0]) or tuple(vector.shape[1:]) != (2, x.shape[2]):
            raise ValueError(
                f"{operation}: {name} must be (1 or {x.shape[0]}, 2, {x.shape[2]}), got shape {tuple(vector.shape)}"
            )


def check_cpu(operation: str, x: torch.Tensor, *others: torch.Tensor | None) -> None:
    """One dtype that the CPU implementation has; `x` contiguous, the others at least in their last axis."""
    tensors = [x, *(tensor for tensor in others if tensor is not None)]
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1 or x.dtype not in cpu.DTYPES:
        raise ValueError(
            f'{operation}: impl="cpu" takes tensors of one dtype, {" or ".join(map(str, cpu.DTYPES))}, got'
            f" {', '.join(sorted(map(str, dtypes)))}"
        )
    if not x.is_contiguous() or any(tensor.stride(-1) != 1 for tensor in tensors):
        raise ValueError(f'{operation}: impl="cpu" takes a contiguous stream and vectors whose last axis is contiguous')


def check_triton(operation: str, x: torch.Tensor, *others: torch.Tensor | None) -> None:
    """Triton is there, `x` is on a GPU, and all tensors have dtypes and a last axis that the kernels take."""
    check_triton_device(operation, x)
    tensors = [x, *(tensor for tensor in others if tensor is not None)]
    if any(tensor.dtype not in gpu.DTYPES for tensor in tensors):
        raise ValueError(
            f'{operation}: impl="triton" takes {", ".join(map(str, gpu.DTYPES))}, got'
            f" {', '.join(sorted({str(tensor.dtype) for tensor in tensors}))}"
        )
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        raise ValueError(f'{operation}: impl="triton" takes tensors whose last axis is contiguous')


def check_triton_device(operation: str, x: torch.Tensor) -> None:
    if why_not_triton() is not None:
        raise ValueError(f'{operation}: impl="triton" cannot work here: {why_not_triton()}')
    if x.device.type != "cuda" and not gpu.INTERPRETED:
        raise ValueError(f'{operation}: impl="triton" takes tensors on a GPU, got {x.device}')


def check_quantized_dtype(operation: str, name: str, dtype: torch.dtype, x: torch.Tensor, impl: str) -> None:
    """`dtype` is an 8-bit type that has a scale, and the device of `x` can multiply it."""
    if dtype not in QUANTIZED_MAXIMUM:
        raise ValueError(f"{operation}: {name} must be {' or '.join(map(str, QUANTIZED_MAXIMUM))}, got {dtype}")
    if impl == "triton" and dtype.is_floating_point and why_not_triton() is None:
        reason = gpu.why_not_e4m3(x.device)
        if reason is not None:
            raise ValueError(f"{operation}: {name}={dtype}: {reason}; torch.int8 works there")


def check_head_dim(operation: str, head_dim: int) -> None:
    if head_dim < 2 or head_dim & (head_dim - 1):
        raise ValueError(f'{operation}: impl="triton" takes head dims that are powers of two, got {head_dim}')


def check_frames(operation: str, **frames: torch.Tensor) -> None:
    for name, tensor in frames.items():
        if tensor.ndim != 5 or tensor.numel() == 0:
            raise ValueError(
                f"{operation}: {name} must be (batch, time, height, width, channels) with no empty axis, got shape"
                f" {tuple(tensor.shape)}"
            )


def check_cpu_frames(operation: str, *frames: torch.Tensor) -> None:
    for tensor in frames:
        if tensor.dtype not in cpu_frames.DTYPES or tensor.stride(4) != 1 or tensor.stride(3) != tensor.shape[4]:
            raise ValueError(
                f'{operation}: impl="cpu" takes {" or ".join(map(str, cpu_frames.DTYPES))} frames whose rows are'
                f" contiguous, got {tensor.dtype} with strides {tensor.stride()}"
            )
