"""What every operation is called with where Triton runs it, on a GPU or interpreted, and how right it has to be."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from cogvx_kernels import ops
from cogvx_kernels.int8_attention import reference
from cogvx_kernels.precision import GROUP

from tests.kernels.budget import assert_no_worse, randn, wide

HALF = (torch.float16, torch.bfloat16)
FLOAT = (*HALF, torch.float32)
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Size:
    batch: int
    sequence: int
    heads: int
    text: int

    @property
    def dim(self):
        return self.heads * 64

    @property
    def frames(self):
        """Of an autoencoder's layer, channels last."""
        return self.batch, 3, 5, 7, 8 * self.heads


def _same(outputs):
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


@dataclass(frozen=True)
class Case:
    """An operation, called.

    Attributes:
        call: with the arguments that `make` gives for a size and a dtype, and `impl`.
        kernels: that "triton" launches, in order.
        exact: what is computed, from the arguments in fp64; None: `call` in torch.
        meaning: outputs as the numbers that they stand for.
        rounding: what is no error beside torch's own: an ulp or two where results are few.
    """

    call: Callable
    make: Callable[[Size, torch.dtype], tuple]
    kernels: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = FLOAT
    exact: Callable | None = None
    meaning: Callable = _same
    rounding: float = 1e-7
    needs_e4m3: bool = False

    def assert_right(self, arguments):
        """The error of "triton" against fp64 is at most 1.1 times that of "torch"."""
        exact = self.exact or (lambda *given: self.call(*given, impl="torch"))
        output, own = (self.meaning(self.call(*arguments, impl=impl)) for impl in ("triton", "torch"))
        assert_no_worse(_same(exact(*wide(arguments))), output, own, rounding=self.rounding)


def _vectors(size, dtype):
    """Affine, and shift, scale and gate as they lie in the modulation table."""
    affine = randn(size.dim, dtype=dtype, seed=3), randn(size.dim, dtype=dtype, seed=4)
    return affine, randn(1, 2, 3, size.dim, dtype=dtype, seed=2).unbind(2)


def _stream(size, dtype, seed=0):
    return randn(size.batch, size.sequence, size.dim, dtype=dtype, seed=seed) * 3 + 1


def _layer_norm_modulate(size, dtype):
    affine, (shift, scale, _) = _vectors(size, dtype)
    return _stream(size, dtype), *affine, shift, scale, size.text


def _gated_residual(size, dtype):
    return _stream(size, dtype), _stream(size, dtype, 1), _vectors(size, dtype)[1][2], size.text


def _gated_residual_layer_norm_modulate(size, dtype):
    affine, (shift, scale, gate) = _vectors(size, dtype)
    return _stream(size, dtype), _stream(size, dtype, 1), gate, *affine, shift, scale, size.text


def _attention(size, dtype):
    return randn(size.batch, size.sequence, 3, size.heads, 64, dtype=dtype, seed=0).unbind(2)


def _rotary(size):
    angles = randn(size.sequence - size.text, 32, dtype=torch.float32, seed=5).repeat_interleave(2, 1)
    return angles.cos(), angles.sin()


def _qk_norm_rope(size, dtype):
    affine = [randn(64, dtype=dtype, seed=seed) for seed in (1, 2, 3, 4)]
    return *_attention(size, dtype)[:2], *affine, _rotary(size), size.text


def _norm_rope(size, dtype):
    query, _, weight, bias, *_ = _qk_norm_rope(size, dtype)
    return query, weight, bias, _rotary(size), size.text


def _linear(size, dtype, quantized=torch.int8, grouped=False):
    x, weight = _stream(size, dtype), randn(size.dim + 3, size.dim, dtype=dtype, seed=1)
    bias = randn(size.dim + 3, dtype=dtype, seed=2)
    return *ops.quantize_rows(x, quantized, grouped), *ops.quantize_rows(weight, quantized), bias


def _scaled_linear(activation=None, quantized=None):
    """In fp64 it is in fp32 what comes out, whatever is rounded to."""

    def call(x, x_scale, weight, weight_scale, bias, impl):
        arguments = (x, x_scale, weight, weight_scale, bias, activation, quantized or bias.dtype)
        return ops.scaled_linear(*arguments, impl=impl)

    def exact(x, x_scale, weight, weight_scale, bias):
        kind = torch.int8 if x.abs().max() <= 127 and x.frac().abs().max() == 0 else FP8
        scales = (scale.float() for scale in (x_scale, weight_scale))
        arguments = (x.to(kind), next(scales), weight.to(kind), next(scales), bias)
        return ops.scaled_linear(*arguments, activation, torch.float32)

    return call, exact


def _restored(outputs):
    """8-bit rows with scales by row or by group, what else there is as it is."""
    *others, numbers, scales = outputs
    scales = scales.double()[..., None]
    if scales.ndim > numbers.ndim:
        scales = scales.expand(*scales.shape[:-1], GROUP).flatten(-2)[..., : numbers.shape[-1]]
    return (*others, numbers.double() * scales)


def _unblocked(outputs):
    """Q and K of 8 bits with a scale for each block of rows."""
    pairs = zip(outputs[::2], outputs[1::2], strict=True)
    rows = reference.BLOCK_ROWS
    return tuple(x.double() * s.repeat_interleave(rows, 2)[:, :, : x.shape[1], None].transpose(1, 2) for x, s in pairs)


def _without_mean(query, key):
    sample = key[:, :: reference.sample_step(key.shape[1])]
    return query * (reference.LOG2_E / 8), key - sample.mean(1, keepdim=True)


def _int8_attention(**options):
    return lambda *arguments, impl: ops.int8_attention(*arguments, **options, impl=impl)


def _frames(size, dtype, seed=0):
    return randn(*size.frames, dtype=dtype, seed=seed)


def _convolution(size, dtype, *kernel):
    channels = size.frames[-1]
    weight = randn(channels + 3, channels, *kernel, dtype=torch.float32, seed=1) / (channels * 9) ** 0.5
    return weight.to(dtype), randn(channels + 3, dtype=dtype, seed=2)


def _causal_conv3d(size, dtype):
    batch, time, height, width, channels = size.frames
    past = randn(batch, 2, height, width, channels, dtype=dtype, seed=3)
    residual = randn(batch, time, height, width, channels + 3, dtype=dtype, seed=4)
    return _frames(size, dtype), *_convolution(size, dtype, 3, 3, 3), past, residual


def _upsample_conv2d(size, dtype):
    return _frames(size, dtype), *_convolution(size, dtype, 3, 3), True


def _modulation(size, dtype):
    batch, _, _, _, channels = size.frames
    tables = (randn(batch, 2, 3, 4, channels, dtype=torch.float32, seed=seed) for seed in (1, 2))
    return _frames(size, dtype), *tables


def _group_norm_modulate_silu(x, scale, shift, impl):
    """The operation as a function; which rows of the tables are read follows from the sizes."""
    indices = [
        torch.arange(length, device=x.device) * there // length
        for length, there in zip(x.shape[1:4], scale.shape[1:4], strict=True)
    ]
    out = torch.full_like(x, float("nan"))
    ops.group_norm_modulate_silu(x, scale, shift, *indices, out, impl)
    return out


def _quantized(operation, **options):
    return lambda *arguments, impl: operation(*arguments, **options, impl=impl)


_TO_INT8 = ("quantize_qk_kernel", "int8_attention_kernel")
_VALUE = ("quantize_qk_kernel", "value_parts_kernel", "quantize_value_kernel", "int8_attention_kernel")
_PRODUCT = ("scaled_linear_kernel",)
_call, _exact = _scaled_linear()
_gelu, _exact_gelu = _scaled_linear("gelu_tanh", torch.int8)


def _of(operation, make, *kernels, **others):
    return Case(operation, make, tuple(f"{name}_kernel" for name in kernels or (operation.__name__,)), **others)


CASES = {
    "layer_norm_modulate": _of(ops.layer_norm_modulate, _layer_norm_modulate),
    "layer_norm_modulate in int8": Case(
        _quantized(ops.layer_norm_modulate, quantize=torch.int8),
        _layer_norm_modulate,
        ("layer_norm_modulate_kernel",),
        exact=ops.layer_norm_modulate,
        meaning=_restored,
    ),
    "gated_residual": _of(ops.gated_residual, _gated_residual),
    "gated_residual_layer_norm_modulate": _of(
        ops.gated_residual_layer_norm_modulate, _gated_residual_layer_norm_modulate
    ),
    "gated_residual_layer_norm_modulate in int8": Case(
        _quantized(ops.gated_residual_layer_norm_modulate, quantize=torch.int8),
        _gated_residual_layer_norm_modulate,
        ("gated_residual_layer_norm_modulate_kernel",),
        exact=ops.gated_residual_layer_norm_modulate,
        meaning=_restored,
    ),
    "norm_rope": _of(ops.norm_rope, _norm_rope, "qk_norm_rope"),
    "qk_norm_rope": _of(ops.qk_norm_rope, _qk_norm_rope),
    "attention": _of(ops.attention, _attention, dtypes=HALF),
    "quantize_rows": Case(
        _quantized(ops.quantize_rows, dtype=torch.int8),
        lambda size, dtype: (_stream(size, dtype),),
        ("quantize_rows_kernel",),
        exact=lambda x: x,
        meaning=_restored,
    ),
    "quantize_rows in e4m3": Case(
        _quantized(ops.quantize_rows, dtype=FP8, grouped=True),
        lambda size, dtype: (_stream(size, dtype),),
        ("quantize_rows_kernel",),
        exact=lambda x: x,
        meaning=_restored,
        needs_e4m3=True,
    ),
    "scaled_linear": Case(_call, _linear, _PRODUCT, exact=_exact),
    "scaled_linear by group": Case(_call, lambda *a: _linear(*a, grouped=True), _PRODUCT, exact=_exact),
    "scaled_linear in e4m3": Case(_call, lambda *a: _linear(*a, FP8), _PRODUCT, exact=_exact, needs_e4m3=True),
    "scaled_linear with GELU, in int8": Case(_gelu, _linear, _PRODUCT, exact=_exact_gelu, meaning=_restored),
    "quantize_qk": _of(ops.quantize_qk, lambda *a: _attention(*a)[:2], exact=_without_mean, meaning=_unblocked),
    "qk_norm_rope_int8": _of(
        ops.qk_norm_rope_int8,
        _qk_norm_rope,
        exact=lambda *a: _without_mean(*ops.qk_norm_rope(*a)),
        meaning=_unblocked,
    ),
    "int8_attention": Case(_int8_attention(), _attention, _TO_INT8, HALF, exact=ops.attention),
    "int8_attention, V without its mean": Case(
        _int8_attention(smooth_value=True), _attention, _VALUE, HALF, exact=ops.attention
    ),
    "int8_attention, V in e4m3": Case(
        _int8_attention(smooth_value=True, value_dtype=FP8),
        _attention,
        _VALUE,
        HALF,
        exact=ops.attention,
        needs_e4m3=True,
    ),
    "group_norm_statistics": Case(
        lambda x, groups, impl: ops.group_norm_statistics(x, groups, impl=impl),
        lambda size, dtype: (_frames(size, dtype) + 2, size.heads),
        ("group_norm_spans_kernel", "group_norm_join_kernel"),
        rounding=4 * torch.finfo(torch.float32).eps,
    ),
    "group_norm_modulate_silu": Case(_group_norm_modulate_silu, _modulation, ("group_norm_modulate_silu_kernel",)),
    "causal_conv3d": Case(lambda *a, impl: ops.causal_conv3d(*a, impl=impl), _causal_conv3d, ("causal_conv3d_kernel",)),
    "upsample_conv2d": _of(ops.upsample_conv2d, _upsample_conv2d),
}
EVERY = [(name, dtype) for name, case in CASES.items() for dtype in case.dtypes]
