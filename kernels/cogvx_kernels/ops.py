"""Public operations: check the arguments, then call the implementation the caller chose.

The formulas, with shapes, are in `reference.py`. There is no fallback: an implementation that does not
exist for an operation raises.
"""

from __future__ import annotations

import torch

from . import reference
from .cpu import frames as cpu_frames
from .cpu import stream as cpu
from .cpu.attention import HEAD_DIM as AMX_HEAD_DIM
from .cpu.attention import attention_amx
from .triton import why_not as why_not_triton

if why_not_triton() is None:
    from .triton import operations as gpu

# What each operation can be computed by. "cpu" is C++, where `why_not()` of `cpu.stream` or `cpu.frames` is None; "amx"
# likewise, of `cpu.attention`; "triton" for `triton.why_not()` None and tensors on a GPU.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "layer_norm_modulate": ("torch", "cpu", "triton"),
    "gated_residual": ("torch", "cpu", "triton"),
    "gated_residual_layer_norm_modulate": ("torch", "cpu", "triton"),
    "norm_rope": ("torch", "cpu", "triton"),
    "qk_norm_rope": ("torch", "cpu", "triton"),
    "attention": ("torch", "amx", "triton"),
    "group_norm_statistics": ("torch", "cpu"),
    "group_norm_modulate_silu": ("torch", "cpu"),
}


def _check_impl(operation: str, impl: str) -> None:
    allowed = IMPLEMENTATIONS[operation]
    if impl not in allowed:
        raise ValueError(f"impl={impl!r} is unknown to {operation}; allowed: {', '.join(map(repr, allowed))}")


def _check_stream(operation: str, x: torch.Tensor, text_length: int) -> None:
    if x.ndim != 3:
        raise ValueError(f"{operation}: x must be (batch, sequence, dim), got shape {tuple(x.shape)}")
    if not 0 <= text_length <= x.shape[1]:
        raise ValueError(f"{operation}: text_length={text_length} must lie in 0..{x.shape[1]}, the sequence length")


def _check_expert_vectors(operation: str, x: torch.Tensor, **vectors: torch.Tensor) -> None:
    for name, vector in vectors.items():
        if vector.ndim != 3 or vector.shape[0] not in (1, x.shape[0]) or tuple(vector.shape[1:]) != (2, x.shape[2]):
            raise ValueError(
                f"{operation}: {name} must be (1 or {x.shape[0]}, 2, {x.shape[2]}), got shape {tuple(vector.shape)}"
            )


def _check_cpu(operation: str, x: torch.Tensor, *others: torch.Tensor | None) -> None:
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


def _check_triton(operation: str, x: torch.Tensor, *others: torch.Tensor | None) -> None:
    """Triton is there, `x` is on a GPU, and all tensors have dtypes and a last axis that the kernels take."""
    if why_not_triton() is not None:
        raise ValueError(f'{operation}: impl="triton" cannot work here: {why_not_triton()}')
    if x.device.type != "cuda" and not gpu.INTERPRETED:
        raise ValueError(f'{operation}: impl="triton" takes tensors on a GPU, got {x.device}')
    tensors = [x, *(tensor for tensor in others if tensor is not None)]
    if any(tensor.dtype not in gpu.DTYPES for tensor in tensors):
        raise ValueError(
            f'{operation}: impl="triton" takes {", ".join(map(str, gpu.DTYPES))}, got'
            f" {', '.join(sorted({str(tensor.dtype) for tensor in tensors}))}"
        )
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        raise ValueError(f'{operation}: impl="triton" takes tensors whose last axis is contiguous')


def layer_norm_modulate(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    text_length: int,
    eps: float = 1e-5,
    impl: str = "torch",
) -> torch.Tensor:
    """Expert AdaLN of the joint stream.

    Args:
        x: `(batch, sequence, dim)`, text rows first.
        weight, bias: `(dim,)` affine of the LayerNorm, or None.
        shift, scale: `(1 or batch, 2, dim)`, the text expert's at index 0, the video expert's at 1.
        text_length: how many leading rows are text.
        impl: "torch"; "cpu": bf16 or fp32 on a CPU for which `cpu.stream.why_not()` is None; "triton": fp16, bf16 or
            fp32 on a GPU. Only "torch" has a backward pass.

    Returns:
        A new tensor of the shape and dtype of `x`.

    Raises:
        ValueError: for shapes that do not fit or an unknown `impl`.
    """
    _check_impl("layer_norm_modulate", impl)
    _check_stream("layer_norm_modulate", x, text_length)
    _check_expert_vectors("layer_norm_modulate", x, shift=shift, scale=scale)
    if impl == "cpu":
        _check_cpu("layer_norm_modulate", x, weight, bias, shift, scale)
        return cpu.layer_norm_modulate(x, weight, bias, shift, scale, text_length, eps)
    if impl == "triton":
        _check_triton("layer_norm_modulate", x, weight, bias, shift, scale)
        return gpu.layer_norm_modulate(x.contiguous(), weight, bias, shift, scale, text_length, eps)
    return reference.layer_norm_modulate(x, weight, bias, shift, scale, text_length, eps)


def gated_residual(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, text_length: int, impl: str = "torch"
) -> torch.Tensor:
    """`x + gate * y` with each row's own gate; shapes as in `layer_norm_modulate`, a new tensor is returned."""
    _check_impl("gated_residual", impl)
    _check_stream("gated_residual", x, text_length)
    _check_expert_vectors("gated_residual", x, gate=gate)
    if y.shape != x.shape:
        raise ValueError(f"gated_residual: y must have the shape of x, {tuple(x.shape)}, got {tuple(y.shape)}")
    if impl == "cpu":
        y = y.contiguous()
        _check_cpu("gated_residual", x, y, gate)
        return cpu.gated_residual(x, y, gate, text_length)
    if impl == "triton":
        _check_triton("gated_residual", x, y, gate)
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x' = x + gate * y` and its expert AdaLN; returns `(x', normed)`, shapes as in `layer_norm_modulate`."""
    operation = "gated_residual_layer_norm_modulate"
    _check_impl(operation, impl)
    _check_stream(operation, x, text_length)
    _check_expert_vectors(operation, x, gate=gate, shift=shift, scale=scale)
    if y.shape != x.shape:
        raise ValueError(f"{operation}: y must have the shape of x, {tuple(x.shape)}, got {tuple(y.shape)}")
    if impl == "cpu":
        y = y.contiguous()
        _check_cpu(operation, x, y, gate, weight, bias, shift, scale)
        return cpu.gated_residual_layer_norm_modulate(x, y, gate, weight, bias, shift, scale, text_length, eps)
    if impl == "triton":
        _check_triton(operation, x, y, gate, weight, bias, shift, scale)
        x, y = x.contiguous(), y.contiguous()
        return gpu.gated_residual_layer_norm_modulate(x, y, gate, weight, bias, shift, scale, text_length, eps)
    return reference.gated_residual_layer_norm_modulate(x, y, gate, weight, bias, shift, scale, text_length, eps)


def norm_rope(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    text_length: int,
    eps: float = 1e-6,
    impl: str = "torch",
) -> torch.Tensor:
    """LayerNorm over each head of Q or K, and rotary positions on the video rows.

    Args:
        x: `(batch, sequence, heads, head_dim)` of any strides with a contiguous last axis.
        weight, bias: `(head_dim,)` or None.
        rotary: cosines and sines, fp32 `(sequence - text_length, head_dim)`, pairs of neighbours alike; None: no
            rotation.

    Returns:
        A new contiguous tensor of the shape and dtype of `x`.

    Raises:
        ValueError: for shapes that do not fit or an unknown `impl`.
    """
    _check_impl("norm_rope", impl)
    _check_norm_rope("norm_rope", x, rotary, text_length)
    if impl == "torch":
        return reference.norm_rope(x, weight, bias, rotary, text_length, eps)
    tables = (None, None) if rotary is None else (table.float().contiguous() for table in rotary)
    if impl == "triton":
        _check_triton("norm_rope", x, weight, bias)
        _check_head_dim("norm_rope", x.shape[3])
        return gpu.norm_rope(x, weight, bias, *tables, text_length, eps)
    if (
        x.dtype not in cpu.DTYPES
        or x.stride(3) != 1
        or any(v is not None and v.dtype != x.dtype for v in (weight, bias))
    ):
        raise ValueError(
            f'norm_rope: impl="cpu" takes {" or ".join(map(str, cpu.DTYPES))} with weights of the same dtype and a'
            f" contiguous last axis, got {x.dtype}"
        )
    return cpu.norm_rope(x, weight, bias, *tables, text_length, eps)


def qk_norm_rope(
    query: torch.Tensor,
    key: torch.Tensor,
    query_weight: torch.Tensor | None,
    query_bias: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    text_length: int,
    eps: float = 1e-6,
    impl: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm_rope` of Q and of K, which have one shape; "triton" does both in one launch."""
    _check_impl("qk_norm_rope", impl)
    _check_norm_rope("qk_norm_rope", query, rotary, text_length)
    if key.shape != query.shape:
        raise ValueError(
            f"qk_norm_rope: key must have the shape of query, {tuple(query.shape)}, got {tuple(key.shape)}"
        )
    affine = (query_weight, query_bias, key_weight, key_bias)
    if impl == "torch":
        return reference.qk_norm_rope(query, key, *affine, rotary, text_length, eps)
    if impl == "triton":
        _check_triton("qk_norm_rope", query, key, *affine)
        _check_head_dim("qk_norm_rope", query.shape[3])
        tables = (None, None) if rotary is None else (table.float().contiguous() for table in rotary)
        return gpu.qk_norm_rope(query, key, *affine, *tables, text_length, eps)
    return (
        norm_rope(query, query_weight, query_bias, rotary, text_length, eps, impl),
        norm_rope(key, key_weight, key_bias, rotary, text_length, eps, impl),
    )


def _check_norm_rope(
    operation: str, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None, text_length: int
) -> None:
    if x.ndim != 4 or not 0 <= text_length <= x.shape[1]:
        raise ValueError(
            f"{operation}: x must be (batch, sequence, heads, head_dim) and text_length at most the sequence, got"
            f" {tuple(x.shape)} and {text_length}"
        )
    if rotary is not None:
        expected = (x.shape[1] - text_length, x.shape[3])
        if x.shape[3] % 2 or any(tuple(table.shape) != expected for table in rotary):
            shapes = " and ".join(str(tuple(table.shape)) for table in rotary)
            raise ValueError(f"{operation}: rotary must be two tables {expected} with an even head dim, got {shapes}")


def _check_head_dim(operation: str, head_dim: int) -> None:
    if head_dim < 2 or head_dim & (head_dim - 1):
        raise ValueError(f'{operation}: impl="triton" takes head dims that are powers of two, got {head_dim}')


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None, impl: str = "torch"
) -> torch.Tensor:
    """Non-causal attention, `softmax(scale * query @ key^T) @ value` for each head.

    Args:
        query: `(batch, sequence, heads, head_dim)`.
        key, value: `(batch, key_sequence, heads, head_dim)` of the same dtype, any strides with a contiguous last axis.
        scale: None for `head_dim ** -0.5`.
        impl: "torch", or "amx": bf16 and head dim 64 on a CPU for which `cpu.attention.why_not()` is None. fp32 scores
            and sums, probabilities rounded to bf16; or "triton": fp16 or bf16, head dim 64 or 128 and a positive scale
            on a GPU, computed in the same way. Only "torch" has a backward pass.

    Returns:
        A new tensor of the shape and dtype of `query`.

    Raises:
        ValueError: for shapes or dtypes that do not fit, or an unknown `impl`.
    """
    _check_impl("attention", impl)
    batch, _, heads, head_dim = query.shape if query.ndim == 4 else (0, 0, 0, 0)
    fits = key.ndim == 4 and key.shape[1] > 0 and (key.shape[0], *key.shape[2:]) == (batch, heads, head_dim)
    if not fits or value.shape != key.shape or query.ndim != 4:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        raise ValueError(
            "attention: query must be (batch, sequence, heads, head_dim), key and value (batch, key_sequence, heads,"
            f" head_dim) with at least one key, got {shapes}"
        )
    scale = head_dim**-0.5 if scale is None else scale
    if impl == "torch":
        return reference.attention(query, key, value, scale)
    if impl == "triton":
        _check_triton("attention", query, key, value)
        dtypes = {query.dtype, key.dtype, value.dtype}
        if head_dim not in gpu.HEAD_DIMS or len(dtypes) > 1 or query.dtype not in gpu.ATTENTION_DTYPES or scale <= 0:
            raise ValueError(
                f'attention: impl="triton" takes {" or ".join(map(str, gpu.ATTENTION_DTYPES))}, head dims'
                f" {', '.join(map(str, gpu.HEAD_DIMS))} and a positive scale, got"
                f" {', '.join(sorted(map(str, dtypes)))}, head dim {head_dim} and scale {scale}"
            )
        return gpu.attention(query, key, value, scale)
    if head_dim != AMX_HEAD_DIM or {query.dtype, key.dtype, value.dtype} != {torch.bfloat16}:
        raise ValueError(
            f'attention: impl="amx" takes bfloat16 and head dim {AMX_HEAD_DIM}, got'
            f" {query.dtype}, {key.dtype}, {value.dtype} and head dim {head_dim}"
        )
    if any(tensor.stride(3) != 1 for tensor in (query, key, value)):
        raise ValueError('attention: impl="amx" takes tensors whose last axis is contiguous')
    return attention_amx(query, key, value, scale)


def _check_frames(operation: str, **frames: torch.Tensor) -> None:
    for name, tensor in frames.items():
        if tensor.ndim != 5 or tensor.numel() == 0:
            raise ValueError(
                f"{operation}: {name} must be (batch, time, height, width, channels) with no empty axis, got shape"
                f" {tuple(tensor.shape)}"
            )


def _check_cpu_frames(operation: str, *frames: torch.Tensor) -> None:
    for tensor in frames:
        if tensor.dtype not in cpu_frames.DTYPES or tensor.stride(4) != 1 or tensor.stride(3) != tensor.shape[4]:
            raise ValueError(
                f'{operation}: impl="cpu" takes {" or ".join(map(str, cpu_frames.DTYPES))} frames whose rows are'
                f" contiguous, got {tensor.dtype} with strides {tensor.stride()}"
            )


def group_norm_statistics(
    x: torch.Tensor, groups: int, eps: float = 1e-6, impl: str = "torch"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and `1 / sqrt(variance + eps)` of each group of channels, over all frames and pixels, in fp32.

    Args:
        x: `(batch, time, height, width, channels)`.
        groups: divides the channels.
        impl: "torch", or "cpu": bf16 or fp32 with contiguous rows on a CPU for which `cpu.frames.why_not()` is None.

    Returns:
        Two tensors `(batch, groups)`, fp32 (fp64 for fp64 frames).

    Raises:
        ValueError: for shapes that do not fit or an unknown `impl`.
    """
    operation = "group_norm_statistics"
    _check_impl(operation, impl)
    _check_frames(operation, x=x)
    if groups < 1 or x.shape[4] % groups:
        raise ValueError(f"{operation}: groups={groups} must divide the {x.shape[4]} channels")
    if impl == "cpu":
        _check_cpu_frames(operation, x)
        return cpu_frames.group_norm_statistics(x, groups, eps)
    return reference.group_norm_statistics(x, groups, eps)


def group_norm_modulate_silu(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    frames: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    out: torch.Tensor,
    impl: str = "torch",
) -> None:
    """`silu(x * scale + shift)` with tables of a lower resolution, written into `out`, a view into padded frames.

    GroupNorm's statistics and affine, and CogVideoX' spatial modulation, are folded into the tables: norm and
    modulation are one product and one sum.

    Args:
        x: `(batch, time, height, width, channels)`.
        scale, shift: fp32 `(batch, table time, table height, table width, channels)`, contiguous.
        frames, rows, columns: int64 `(time,)`, `(height,)` and `(width,)`, where in the tables each frame, row and
            column is. They are not checked against the tables' sizes: that would be a synchronisation on a GPU.
        out: of the shape and dtype of `x`; may be a view with rows and frames of padding around it, not `x` itself.
        impl: "torch", or "cpu": bf16 or fp32 with contiguous rows on a CPU for which `cpu.frames.why_not()` is None.

    Raises:
        ValueError: for shapes that do not fit or an unknown `impl`.
    """
    operation = "group_norm_modulate_silu"
    _check_impl(operation, impl)
    _check_frames(operation, x=x, scale=scale, shift=shift)
    if out.shape != x.shape or out.dtype != x.dtype:
        raise ValueError(
            f"{operation}: out must be {tuple(x.shape)} {x.dtype} as x is, got {tuple(out.shape)} {out.dtype}"
        )
    batch, time, height, width, channels = x.shape
    if scale.shape != shift.shape or (scale.shape[0], scale.shape[4]) != (batch, channels):
        raise ValueError(
            f"{operation}: scale and shift must be ({batch}, time, height, width, {channels}), got"
            f" {tuple(scale.shape)} and {tuple(shift.shape)}"
        )
    for name, index, length in (("frames", frames, time), ("rows", rows, height), ("columns", columns, width)):
        if tuple(index.shape) != (length,) or index.dtype != torch.int64:
            raise ValueError(f"{operation}: {name} must be int64 ({length},), got {index.dtype} {tuple(index.shape)}")
    if impl == "cpu":
        _check_cpu_frames(operation, x, out)
        tables_fit = all(table.is_contiguous() and table.dtype == torch.float32 for table in (scale, shift))
        if not tables_fit or not all(index.is_contiguous() for index in (frames, rows, columns)):
            raise ValueError(f'{operation}: impl="cpu" takes contiguous fp32 tables and contiguous indices')
        cpu_frames.group_norm_modulate_silu(x, scale, shift, frames, rows, columns, out)
    else:
        reference.group_norm_modulate_silu(x, scale, shift, frames, rows, columns, out)
