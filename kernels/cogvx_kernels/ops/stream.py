"""Operations on the joint `[text; video]` stream: norms, modulation and gates."""

from __future__ import annotations

import torch

from .. import reference
from ..cpu import stream as cpu
from .checks import (
    check_cpu,
    check_expert_vectors,
    check_impl,
    check_quantized_dtype,
    check_stream,
    check_triton,
    gpu,
)


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
        impl: "torch"; "cpu": bf16 or fp32 on a CPU, if `cpu.stream.why_unavailable()` is None; "triton": fp16, bf16 or
            fp32 on a GPU. Only "torch" has a backward pass.
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
    check_expert_vectors("layer_norm_modulate", x, shift=shift, scale=scale)
    _check_quantize("layer_norm_modulate", x, impl, quantize)
    if impl == "cpu":
        check_cpu("layer_norm_modulate", x, weight, bias, shift, scale)
        return cpu.layer_norm_modulate(x, weight, bias, shift, scale, text_length, eps)
    if impl == "triton":
        check_triton("layer_norm_modulate", x, weight, bias, shift, scale)
        arguments = (x.contiguous(), weight, bias, shift, scale, text_length, eps)
        if quantize is not None:
            return gpu.layer_norm_modulate_quantized(*arguments, quantize)
        return gpu.layer_norm_modulate(*arguments)
    return reference.layer_norm_modulate(x, weight, bias, shift, scale, text_length, eps, quantize)


def _check_quantize(operation: str, x: torch.Tensor, impl: str, quantize: torch.dtype | None) -> None:
    if quantize is None:
        return
    if impl == "cpu":
        raise ValueError(f'{operation}: impl="cpu" does not quantize, got quantize={quantize}; "torch" and "triton" do')
    check_quantized_dtype(operation, "quantize", quantize, x, impl)


def gated_residual(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, text_length: int, impl: str = "torch"
) -> torch.Tensor:
    """`x + gate * y` with each row's own gate; shapes as in `layer_norm_modulate`, a new tensor is returned."""
    check_impl("gated_residual", impl)
    check_stream("gated_residual", x, text_length)
    check_expert_vectors("gated_residual", x, gate=gate)
    if y.shape != x.shape:
        raise ValueError(f"gated_residual: y must have the shape of x, {tuple(x.shape)}, got {tuple(y.shape)}")
    if impl == "cpu":
        y = y.contiguous()
        check_cpu("gated_residual", x, y, gate)
        return cpu.gated_residual(x, y, gate, text_length)
    if impl == "triton":
        check_triton("gated_residual", x, y, gate)
        return gpu.gated_residual(x.contiguous(), y.contiguous(), gate, text_length)
    return reference.gated_residual(x, y, gate, text_length)


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
    check_expert_vectors(operation, x, gate=gate, shift=shift, scale=scale)
    _check_quantize(operation, x, impl, quantize)
    if y.shape != x.shape:
        raise ValueError(f"{operation}: y must have the shape of x, {tuple(x.shape)}, got {tuple(y.shape)}")
    if impl == "cpu":
        y = y.contiguous()
        check_cpu(operation, x, y, gate, weight, bias, shift, scale)
        return cpu.gated_residual_layer_norm_modulate(x, y, gate, weight, bias, shift, scale, text_length, eps)
    if impl == "triton":
        check_triton(operation, x, y, gate, weight, bias, shift, scale)
        arguments = (x.contiguous(), y.contiguous(), gate, weight, bias, shift, scale, text_length, eps)
        if quantize is not None:
            return gpu.gated_residual_layer_norm_modulate_quantized(*arguments, quantize)
        return gpu.gated_residual_layer_norm_modulate(*arguments)
    return reference.gated_residual_layer_norm_modulate(
        x, y, gate, weight, bias, shift, scale, text_length, eps, quantize
    )
