"""What all operations check before they compute: implementations, layouts, dtypes."""

from __future__ import annotations

import torch

from ._triton import MISSING
from .precision import QUANTIZED_MAXIMUM
from .targets import why_not_e4m3

if MISSING is None:
    from ._triton.tuned import INTERPRETED
else:
    INTERPRETED = False

CPU_DTYPES = (torch.bfloat16, torch.float32)
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# What each operation can be computed by: "torch" anywhere; the others where `ops.why_unavailable` says None. "cpu" is
# C++ for any CPU, "amx" and "avx512" for those that have it, "direct" and "winograd" are C++ for any CPU as well.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "layer_norm_modulate": ("torch", "cpu", "triton"),
    "gated_residual": ("torch", "cpu", "triton"),
    "gated_residual_layer_norm_modulate": ("torch", "cpu", "triton"),
    "norm_rope": ("torch", "cpu", "triton"),
    "qk_norm_rope": ("torch", "cpu", "triton"),
    "attention": ("torch", "amx", "avx512", "triton"),
    "group_norm_statistics": ("torch", "cpu", "triton"),
    "group_norm_modulate_silu": ("torch", "cpu", "triton"),
    "causal_conv3d": ("torch", "triton"),
    "upsample_conv2d": ("torch", "triton"),
    "packed_conv3d": ("direct", "winograd"),
    "packed_linear": ("cpu",),
    "bias_gelu": ("cpu",),
    "int8_products": ("cpu",),
    "quantize_rows": ("torch", "cpu", "triton"),
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


def check_cpu(operation: str, x: torch.Tensor, *others: torch.Tensor | None) -> None:
    """One dtype that the CPU implementation has; `x` contiguous, the others at least in their last axis."""
    tensors = [x, *(tensor for tensor in others if tensor is not None)]
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1 or x.dtype not in CPU_DTYPES:
        raise ValueError(
            f'{operation}: impl="cpu" takes tensors of one dtype, {" or ".join(map(str, CPU_DTYPES))}, got'
            f" {', '.join(sorted(map(str, dtypes)))}"
        )
    if not x.is_contiguous() or any(tensor.stride(-1) != 1 for tensor in tensors):
        raise ValueError(f'{operation}: impl="cpu" takes a contiguous stream and vectors whose last axis is contiguous')


def check_triton(operation: str, x: torch.Tensor, *others: torch.Tensor | None) -> None:
    """Triton is there, `x` is on a GPU, and all tensors have dtypes and a last axis that the kernels take."""
    check_triton_device(operation, x)
    tensors = [x, *(tensor for tensor in others if tensor is not None)]
    if any(tensor.dtype not in TRITON_DTYPES for tensor in tensors):
        raise ValueError(
            f'{operation}: impl="triton" takes {", ".join(map(str, TRITON_DTYPES))}, got'
            f" {', '.join(sorted({str(tensor.dtype) for tensor in tensors}))}"
        )
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        raise ValueError(f'{operation}: impl="triton" takes tensors whose last axis is contiguous')


def check_triton_device(operation: str, x: torch.Tensor) -> None:
    if MISSING is not None:
        raise ValueError(f'{operation}: impl="triton" cannot work here: {MISSING}')
    if x.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f'{operation}: impl="triton" takes tensors on a GPU, got {x.device}')


def check_quantized_dtype(operation: str, name: str, dtype: torch.dtype, x: torch.Tensor, impl: str) -> None:
    """`dtype` is an 8-bit type that has a scale, and the device of `x` can multiply it."""
    if dtype not in QUANTIZED_MAXIMUM:
        raise ValueError(f"{operation}: {name} must be {' or '.join(map(str, QUANTIZED_MAXIMUM))}, got {dtype}")
    if impl == "triton" and dtype.is_floating_point:
        check_e4m3(operation, name, dtype, x.device)


def check_e4m3(operation: str, name: str, dtype: torch.dtype, device: torch.device) -> None:
    # What is asked of a driver cannot be compiled. Who compiles has asked before.
    if torch.compiler.is_compiling():
        return
    if (reason := why_not_e4m3(device)) is not None:
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
        if tensor.dtype not in CPU_DTYPES or tensor.stride(4) != 1 or tensor.stride(3) != tensor.shape[4]:
            raise ValueError(
                f'{operation}: impl="cpu" takes {" or ".join(map(str, CPU_DTYPES))} frames whose rows are'
                f" contiguous, got {tensor.dtype} with strides {tensor.stride()}"
            )
