"""Micro-benchmarks of quantization and of the 8-bit linear layers, beside the 16-bit layers whose place they take.

At the sizes of `test_ops.py`, and run as that is. An 8-bit operation is checked before it is timed, on the first rows
of each sample: its error against the float64 product of the unquantized operands may be at most 1.1 times that of the
plain torch formula on the same 8-bit numbers.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from cogvx_kernels import ops
from cogvx_kernels.targets import why_not_e4m3

from benchmarks.kernels.timing import CHECKED, DEVICE, TEXT, WIDTHS, clock, error, generator, stream, timed
from benchmarks.kernels.timing import randn as normal

pytestmark = pytest.mark.benchmark(timer=clock)

QUANTIZED = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}
# Layer: its widths in and out in units of the stream's, and whether GELU and quantization follow.
LAYERS = {"qkv": (1, 3, False), "projection": (1, 1, False), "up": (1, 4, True), "down": (4, 1, False)}


def randn(*shape, seed, dtype=torch.bfloat16):
    return normal(*shape, generator=generator(seed), dtype=dtype)


def skip_where_it_cannot_run(quantized):
    if DEVICE.type != "cuda":
        pytest.skip("it runs on cuda")
    reason = ops.why_unavailable("scaled_linear", "triton", DEVICE)
    if reason is None and QUANTIZED[quantized].is_floating_point:
        reason = why_not_e4m3(DEVICE)
    if reason is not None:
        pytest.skip(reason)


def restored(output):
    """Numbers in 8 bits times their scales, by row or by group of 128; others as they are."""
    if torch.is_tensor(output):
        return output.double()
    numbers, scales = (tensor.double() for tensor in output)
    scales = scales[..., None] if scales.ndim < numbers.ndim else scales.repeat_interleave(128, dim=-1)
    return numbers * scales[..., : numbers.shape[-1]]


def first(output):
    """The rows of each sample that are checked; every row is computed by itself."""
    return tuple(x[:, :CHECKED] for x in output) if isinstance(output, tuple) else output[:, :CHECKED]


def checked(benchmark, call, given, plain, exact, **info):
    """Time `call(**given)`, whose first rows are as near to `exact` as those of `plain` are."""
    own, found = (error(restored(output), exact) for output in (plain, first(call(**given))))
    assert found <= 1.1 * own, f"error {found:.3g} is above 1.1 x the formula's own, {own:.3g}: no speed is stated"
    timed(benchmark, call, given, error=found, own_error=own, **info)


def operands(layer, width):
    columns, features, is_up = LAYERS[layer]
    batch, tokens, dim = stream(width)
    x = randn(batch, tokens, columns * dim, seed=0)
    weight = randn(features * dim, columns * dim, seed=1) / (columns * dim) ** 0.5
    return {"x": x, "weight": weight, "bias": randn(features * dim, seed=2)}, is_up


def linear(x, weight, bias, is_up):
    output = F.linear(x, weight, bias)
    return F.gelu(output, approximate="tanh") if is_up else output


def operations_of(x, weight):
    return {"shape": [*x.shape], "features": weight.shape[0], "operations": 2 * x.numel() * weight.shape[0]}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("layer", LAYERS)
@torch.no_grad()
def test_16_bits(benchmark, layer, width):
    benchmark.group = f"{layer} {width}"
    given, is_up = operands(layer, width)
    timed(benchmark, functools.partial(linear, is_up=is_up), given, **operations_of(given["x"], given["weight"]))


@pytest.mark.parametrize("quantized", QUANTIZED)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("layer", LAYERS)
@torch.no_grad()
def test_8_bits(benchmark, layer, width, quantized):
    skip_where_it_cannot_run(quantized)
    benchmark.group = f"{layer} {width}"
    operand, is_up = operands(layer, width)
    x, weight, bias = operand.values()
    dtype = QUANTIZED[quantized]
    numbers, scales = ops.quantize_rows(x, dtype, grouped=layer == "down")
    weights, weight_scales = ops.quantize_rows(weight, dtype)
    given = {"x": numbers, "x_scale": scales, "weight": weights, "weight_scale": weight_scales, "bias": bias}
    after = {"activation": "gelu_tanh", "out_dtype": dtype} if is_up else {"out_dtype": torch.bfloat16}
    plain = ops.scaled_linear(**given | {"x": first(numbers), "x_scale": first(scales)}, **after)
    exact = linear(*(tensor.double() for tensor in (first(x), weight, bias)), is_up)
    call = functools.partial(ops.scaled_linear, **after, impl="triton")
    checked(benchmark, call, given, plain, exact, **operations_of(x, weight))


@pytest.mark.parametrize("quantized", QUANTIZED)
@pytest.mark.parametrize("width", WIDTHS)
@torch.no_grad()
def test_quantize_rows(benchmark, width, quantized):
    skip_where_it_cannot_run(quantized)
    benchmark.group = f"quantize_rows {width}"
    x = randn(*stream(width), seed=0)
    plain = ops.quantize_rows(first(x), QUANTIZED[quantized])
    call = functools.partial(ops.quantize_rows, dtype=QUANTIZED[quantized], impl="triton")
    checked(benchmark, call, {"x": x}, plain, first(x).double(), shape=[*x.shape])


@pytest.mark.parametrize("quantized", QUANTIZED)
@pytest.mark.parametrize("width", WIDTHS)
@torch.no_grad()
def test_norm_into_8_bits(benchmark, width, quantized):
    skip_where_it_cannot_run(quantized)
    benchmark.group = f"gated_residual_layer_norm_modulate {width}"
    batch, tokens, dim = stream(width)
    x, y = (randn(batch, tokens, dim, seed=seed) for seed in (0, 1))
    gate, shift, scale = (randn(1, 2, dim, seed=seed) for seed in (2, 3, 4))
    given = {"x": x, "y": y, "gate": gate, "shift": shift, "scale": scale}
    none = {"weight": None, "bias": None, "text_length": TEXT, "quantize": QUANTIZED[quantized]}
    plain = ops.gated_residual_layer_norm_modulate(**given | {"x": first(x), "y": first(y)}, **first_text(none))
    vectors = (shift.double(), scale.double())
    exact = ops.layer_norm_modulate(plain[0].double(), None, None, *vectors, first_text(none)["text_length"])

    def call(**given):
        return ops.gated_residual_layer_norm_modulate(**given, **none, impl="triton")[1:]

    checked(benchmark, call, given, plain[1:], exact, shape=[*x.shape])


def first_text(options):
    """The same for the first rows alone, which are fewer than the text."""
    return options | {"text_length": min(options["text_length"], CHECKED)}
