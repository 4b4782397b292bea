"""Micro-benchmarks of quantization and of the 8-bit linear layers, beside the 16-bit layers whose place they take.

At the width of CogVideoX-2b and 5b and the reduced clip of `dit-2b`; run as `test_ops.py` is. An 8-bit operation is
checked before it is timed: its error against the float64 product of the unquantized operands may be at most 1.1 times
that of the plain torch formula on the same 8-bit numbers.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from cogvx_kernels import ops, triton
from test_ops import BATCH, DEVICE, TEXT, TOKENS, WIDTHS, error

if triton.why_unavailable() is None:
    from cogvx_kernels.triton.targets import why_not_e4m3


QUANTIZED = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}
# Layer: its widths in and out in units of the stream's, and whether GELU and quantization follow.
LAYERS = {"qkv": (1, 3, False), "projection": (1, 1, False), "up": (1, 4, True), "down": (4, 1, False)}


def randn(*shape, seed, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def skip_where_it_cannot_run(quantized):
    reason = "it runs on cuda" if DEVICE != "cuda" else triton.why_unavailable() or None
    if reason is None and QUANTIZED[quantized].is_floating_point:
        reason = why_not_e4m3(torch.device(DEVICE))
    if reason is not None:
        pytest.skip(reason)


def restored(output):
    """Numbers in 8 bits times their scales, by row or by group of 128; others as they are."""
    if torch.is_tensor(output):
        return output.double()
    numbers, scales = (tensor.double() for tensor in output)
    scales = scales[..., None] if scales.ndim < numbers.ndim else scales.repeat_interleave(128, dim=-1)
    return numbers * scales[..., : numbers.shape[-1]]


def timed(benchmark, call, **info):
    def synchronized():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(device=DEVICE, **info)
    with torch.no_grad():
        benchmark.pedantic(synchronized, rounds=10, iterations=3, warmup_rounds=3)


def checked(benchmark, call, plain, exact, **info):
    own, found = (error(restored(output), exact) for output in (plain, call()))
    assert found <= 1.1 * own, f"error {found:.3g} is above 1.1 x the formula's own, {own:.3g}: no speed is stated"
    timed(benchmark, call, error=found, own_error=own, **info)


def operands(layer, width):
    columns, features, is_up = LAYERS[layer]
    dim = WIDTHS[width]
    x = randn(BATCH, TOKENS, columns * dim, seed=0)
    weight = randn(features * dim, columns * dim, seed=1) / (columns * dim) ** 0.5
    return x, weight, randn(features * dim, seed=2), is_up


def linear(x, weight, bias, is_up):
    output = F.linear(x, weight, bias)
    return F.gelu(output, approximate="tanh") if is_up else output


def operations_of(x, weight):
    return {"shape": [*x.shape], "features": weight.shape[0], "operations": 2 * x.numel() * weight.shape[0]}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("layer", LAYERS)
def test_16_bits(benchmark, layer, width):
    benchmark.group = f"{layer} {width}"
    x, weight, bias, is_up = operands(layer, width)
    timed(benchmark, functools.partial(linear, x, weight, bias, is_up), **operations_of(x, weight))


@pytest.mark.parametrize("quantized", QUANTIZED)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("layer", LAYERS)
def test_8_bits(benchmark, layer, width, quantized):
    skip_where_it_cannot_run(quantized)
    benchmark.group = f"{layer} {width}"
    x, weight, bias, is_up = operands(layer, width)
    dtype = QUANTIZED[quantized]
    pairs = ops.quantize_rows(x, dtype, grouped=layer == "down") + ops.quantize_rows(weight, dtype)
    after = ("gelu_tanh", dtype) if is_up else (None, torch.bfloat16)
    call = functools.partial(ops.scaled_linear, *pairs, bias, *after)
    exact = linear(*(tensor.double() for tensor in (x, weight, bias)), is_up)
    checked(benchmark, functools.partial(call, impl="triton"), call(), exact, **operations_of(x, weight))


@pytest.mark.parametrize("quantized", QUANTIZED)
@pytest.mark.parametrize("width", WIDTHS)
def test_quantize_rows(benchmark, width, quantized):
    skip_where_it_cannot_run(quantized)
    benchmark.group = f"quantize_rows {width}"
    x = randn(BATCH, TOKENS, WIDTHS[width], seed=0)
    call = functools.partial(ops.quantize_rows, x, QUANTIZED[quantized])
    checked(benchmark, functools.partial(call, impl="triton"), call(), x.double(), shape=[*x.shape])


@pytest.mark.parametrize("quantized", QUANTIZED)
@pytest.mark.parametrize("width", WIDTHS)
def test_norm_into_8_bits(benchmark, width, quantized):
    skip_where_it_cannot_run(quantized)
    benchmark.group = f"gated_residual_layer_norm_modulate {width}"
    dim = WIDTHS[width]
    x, y = (randn(BATCH, TOKENS, dim, seed=seed) for seed in (0, 1))
    gate, shift, scale = (randn(1, 2, dim, seed=seed) for seed in (2, 3, 4))
    given = (x, y, gate, None, None, shift, scale)
    call = functools.partial(ops.gated_residual_layer_norm_modulate, *given, TEXT, quantize=QUANTIZED[quantized])
    stream, shift, scale = (tensor.double() for tensor in (call()[0], shift, scale))
    exact = ops.layer_norm_modulate(stream, None, None, shift, scale, TEXT)
    checked(benchmark, lambda: call(impl="triton")[1:], call()[1:], exact, shape=[*x.shape])
