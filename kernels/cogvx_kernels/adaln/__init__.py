"""Expert AdaLN and gated residuals of the joint `[text; video]` stream."""

from __future__ import annotations

import torch

from .._triton import kernels_of
from ..checks import check_cpu, check_impl, check_quantized_dtype, check_stream, check_triton
from . import cpu, reference

gpu = kernels_of(__name__)


def layer_norm_modulate(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    text_length: int,
    eps: float = 1e-5,
    impl: str = "torch",
    quantize: torch.dtype | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Expert AdaLN of the joint stream.

    Args:
        x: `(batch, sequence, dim)`, text rows first.
        weight, bias: `(dim,)` affine of the LayerNorm, or None.
        shift, scale: `(1 or batch, 2, dim)`, the text expert's at index 0, the video expert's at 1.
        text_length: how many leading rows are text.
        impl: "torch"; "cpu": bf16 or fp32 on a CPU; "triton": fp16, bf16 or fp32 on a GPU. Only "torch" has a backward
            pass.
        quantize: `torch.int8` or `torch.float8_e4m3fn`, but for "cpu": the norm is quantized from fp32, as by
            `quantize_rows`, and never written in the dtype of `x`.

    Returns:
        A new tensor of the shape and dtype of `x`; or, with `quantize`, 8-bit numbers of that shape and their scales,
        fp32 `(batch, sequence)`.

    Raises:
        ValueError: for shapes that do not fit, an unknown `impl`, or a `quantize` that it cannot do.
    """
    check_impl("layer_norm_modulate", impl)
    check_stream("layer_norm_modulate", x, text_length)
    _check_expert_vectors("layer_norm_modulate", x, shift=shift, scale=scale)
    _check_quantize("layer_norm_modulate", x, impl, quantize)
    if impl == "torch":
        return reference.layer_norm_modulate(x, weight, bias, shift, scale, text_length, eps, quantize)
    arguments = (weight, bias, shift, scale, text_length, eps)
    if impl == "cpu":
        check_cpu("layer_norm_modulate", x, weight, bias, shift, scale)
        return cpu.layer_norm_modulate(x, *arguments)
    check_triton("layer_norm_modulate", x, weight, bias, shift, scale)
    x = x.contiguous()
    outputs = _outputs(x, quantize)
    gpu.layer_norm_modulate(x, *arguments, *outputs)
    return _without_none(*outputs)


def gated_residual(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, text_length: int, impl: str = "torch"
) -> torch.Tensor:
    """`x + gate * y` with each row's own gate; shapes as in `layer_norm_modulate`, a new tensor is returned."""
    check_impl("gated_residual", impl)
    check_stream("gated_residual", x, text_length)
    _check_expert_vectors("gated_residual", x, gate=gate)
    _check_branch("gated_residual", x, y)
    if impl == "torch":
        return reference.gated_residual(x, y, gate, text_length)
    y = y.contiguous()
    if impl == "cpu":
        check_cpu("gated_residual", x, y, gate)
        return cpu.gated_residual(x, y, gate, text_length)
    check_triton("gated_residual", x, y, gate)
    x = x.contiguous()
    output = torch.empty_like(x)
    gpu.gated_residual(x, y, gate, text_length, output)
    return output


def gated_residual_layer_norm_modulate(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    text_length: int,
    eps: float = 1e-5,
    impl: str = "torch",
    quantize: torch.dtype | None = None,
) -> tuple[torch.Tensor, ...]:
    """`x' = x + gate * y` and its expert AdaLN; returns `(x', normed)`, shapes as in `layer_norm_modulate`; with
    `quantize`, `(x', numbers, scales)`."""
    operation = "gated_residual_layer_norm_modulate"
    check_impl(operation, impl)
    check_stream(operation, x, text_length)
    _check_expert_vectors(operation, x, gate=gate, shift=shift, scale=scale)
    _check_branch(operation, x, y)
    _check_quantize(operation, x, impl, quantize)
    arguments = (gate, weight, bias, shift, scale, text_length, eps)
    if impl == "torch":
        return reference.gated_residual_layer_norm_modulate(x, y, *arguments, quantize)
    y = y.contiguous()
    if impl == "cpu":
        check_cpu(operation, x, y, gate, weight, bias, shift, scale)
        return cpu.gated_residual_layer_norm_modulate(x, y, *arguments)
    check_triton(operation, x, y, gate, weight, bias, shift, scale)
    x = x.contiguous()
    residual, outputs = torch.empty_like(x), _outputs(x, quantize)
    gpu.gated_residual_layer_norm_modulate(x, y, *arguments, residual, *outputs)
    return residual, *(tensor for tensor in outputs if tensor is not None)


def _outputs(x: torch.Tensor, quantize: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Memory for a norm of `x`, and for its scales if it is quantized."""
    if quantize is None:
        return torch.empty_like(x), None
    scales = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=quantize, device=x.device), scales


def _without_none(
    output: torch.Tensor, scales: torch.Tensor | None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    return output if scales is None else (output, scales)


def _check_expert_vectors(operation: str, x: torch.Tensor, **vectors: torch.Tensor) -> None:
    for name, vector in vectors.items():
        if vector.ndim != 3 or vector.shape[0] not in (1, x.shape[0]) or tuple(vector.shape[1:]) != (2, x.shape[2]):
            raise ValueError(
                f"{operation}: {name} must be (1 or {x.shape[0]}, 2, {x.shape[2]}), got shape {tuple(vector.shape)}"
            )


def _check_branch(operation: str, x: torch.Tensor, y: torch.Tensor) -> None:
    if y.shape != x.shape:
        raise ValueError(f"{operation}: y must have the shape of x, {tuple(x.shape)}, got {tuple(y.shape)}")


def _check_quantize(operation: str, x: torch.Tensor, impl: str, quantize: torch.dtype | None) -> None:
    if quantize is None:
        return
    if impl == "cpu":
        raise ValueError(f'{operation}: impl="cpu" does not quantize, got quantize={quantize}; "torch" and "triton" do')
    check_quantized_dtype(operation, "quantize", quantize, x, impl)
