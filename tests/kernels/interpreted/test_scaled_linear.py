"""Quantization and the 8-bit linear layer as Triton kernels, interpreted, against the formulas in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F
from cogvx_kernels import checks, ops, precision
from cogvx_kernels.w8a8_linear import triton as kernels

from tests.kernels.budget import randn

from .conftest import guarded

QUANTIZED = [torch.int8, torch.float8_e4m3fn]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# rows, out_features, in_features: one of each, ends that no tile divides, whole tiles, an end of 4 columns.
SHAPES = [(1, 1, 1), (3, 5, 130), (33, 65, 64), (130, 129, 20), (17, 260, 388)]
# dB on normal data, as much as the type can do: int8 has steps of a 127th of the largest of thousands, 3.5 deviations;
# e4m3 has 3 bits behind the first.
FLOOR = {torch.int8: 35, torch.float8_e4m3fn: 28}


def snr(output, truth):
    return 20 * math.log10(truth.norm() / (output.double() - truth).norm())


def restored(numbers, scales):
    """What 8-bit numbers stand for, in fp64, with scales by row or by group."""
    scales = scales.double()[..., None]
    if scales.ndim > numbers.ndim:
        scales = scales.expand(*scales.shape[:-1], precision.GROUP).flatten(-2)[..., : numbers.shape[-1]]
    return numbers.double() * scales


def assert_quantized_alike(output, expected, steps):
    """Scales to the rounding of fp32; numbers equal, but for those that it moved over the half between two."""
    numbers, scales = output
    assert numbers.dtype == expected[0].dtype and numbers.shape == expected[0].shape
    torch.testing.assert_close(scales, expected[1], rtol=1e-5, atol=0, equal_nan=True)
    difference = (numbers.float() - expected[0].float()).abs()
    largest = precision.QUANTIZED_MAXIMUM[numbers.dtype]
    assert difference.max() <= (1 if numbers.dtype == torch.int8 else largest / 14)
    assert (difference > 0).float().mean() <= steps


@pytest.mark.parametrize("quantized", QUANTIZED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (2, 3, 128), (7, 300), (9, 1, 513)])
def test_quantize_rows(shape, grouped, dtype, quantized):
    x = guarded(randn(*shape, dtype=dtype, seed=0) * 3)
    output = ops.quantize_rows(x, quantized, grouped, impl="triton")
    expected = ops.quantize_rows(x, quantized, grouped)
    assert torch.equal(output[0].float(), expected[0].float()) and torch.equal(output[1], expected[1])
    groups = (-(-shape[-1] // precision.GROUP),) if grouped else ()
    assert output[1].shape == (*shape[:-1], *groups) and output[1].dtype == torch.float32
    error = (restored(*output) - x.double()).abs()
    largest = x.double().abs().amax(-1, keepdim=True)
    step = largest / 127 if quantized == torch.int8 else (x.double().abs() / 8).clamp(min=largest / 2**16)
    assert (error <= 0.501 * step).all()


@pytest.mark.parametrize("quantized", QUANTIZED, ids=str)
@pytest.mark.parametrize("grouped", [False, True])
def test_rows_without_a_usable_maximum(quantized, grouped):
    x = randn(6, 200, dtype=torch.float32, seed=0)
    x[0], x[1, 3], x[2, 4], x[3, 5], x[4] = 0, float("nan"), float("inf"), -float("inf"), 1e-42
    output = ops.quantize_rows(guarded(x), quantized, grouped, impl="triton")
    expected = ops.quantize_rows(x, quantized, grouped)
    assert torch.equal(output[0].float(), expected[0].float())
    torch.testing.assert_close(output[1], expected[1], rtol=0, atol=0, equal_nan=True)
    numbers, scales = output[0].float(), output[1].view(6, -1)
    assert (scales[[0, 4, 5]] > 0).all() and (numbers[[0, 4]] == 0).all() and numbers[5].abs().sum() > 0
    assert scales[1:4, 0].isnan().all() and (numbers[1:4, :128] == 0).all()
    weight = ops.quantize_rows(randn(3, 200, dtype=torch.float32, seed=1), quantized)
    for impl in ("torch", "triton"):
        product = ops.scaled_linear(*output, *weight, out_dtype=torch.float32, impl=impl)
        assert product[1:4].isnan().all() and (product[0] == 0).all() and product[[4, 5]].isfinite().all()


def layer(rows, out_features, in_features, quantized, grouped, dtype=torch.float32):
    x, weight = randn(rows, in_features, dtype=dtype, seed=0), randn(out_features, in_features, dtype=dtype, seed=1)
    bias = guarded(randn(out_features, dtype=dtype, seed=2))
    pairs = ops.quantize_rows(x, quantized, grouped) + ops.quantize_rows(weight, quantized)
    return tuple(guarded(tensor) for tensor in pairs), bias


@pytest.mark.parametrize("quantized", QUANTIZED, ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
@pytest.mark.parametrize(("rows", "out_features", "in_features"), SHAPES)
def test_scaled_linear(rows, out_features, in_features, activation, grouped, out_dtype, quantized):
    operands, bias = layer(rows, out_features, in_features, quantized, grouped, out_dtype)
    for b in (bias, None):
        output = ops.scaled_linear(*operands, b, activation, out_dtype, impl="triton")
        expected = ops.scaled_linear(*operands, b, activation, torch.float32).double()
        assert output.shape == (rows, out_features) and output.dtype == out_dtype
        own = (expected.to(out_dtype).double() - expected).norm() / expected.norm()
        error = (output.double() - expected).norm() / expected.norm()
        # In fp32 the formula, which is in fp64, has no error: some roundings of the kernel's own.
        assert error <= (1e-6 if out_dtype == torch.float32 else 1.1 * own + 1e-7)


@pytest.mark.parametrize("grouped", [False, True])
def test_sums_of_int8_are_exact(grouped):
    x = torch.randint(-127, 128, (9, 700), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    x[0], x[1] = 127, -127  # the largest sum of a group, 128 * 127^2, and of the whole depth
    weight = torch.full((5, 700), 127, dtype=torch.int8)
    weight[1:] = torch.randint(-127, 128, (4, 700), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    ones = torch.ones(9, 6) if grouped else torch.ones(9)
    output = ops.scaled_linear(x, ones, weight, torch.ones(5), out_dtype=torch.float32, impl="triton")
    exact = x.long() @ weight.long().T
    assert exact.abs().max() == 700 * 127**2 and torch.equal(output.long(), exact)


@pytest.mark.parametrize("quantized", QUANTIZED, ids=str)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("rows", "out_features", "in_features"), SHAPES)
def test_quantized_output(rows, out_features, in_features, grouped, quantized):
    operands, bias = layer(rows, out_features, in_features, quantized, grouped)
    # A group of one column may be GELU of one large negative number, where even fp64's 1 + tanh is all rounding.
    activation = None if out_features % precision.GROUP == 1 else "gelu_tanh"
    output = ops.scaled_linear(*operands, bias, activation, quantized, impl="triton")
    expected = ops.scaled_linear(*operands, bias, activation, quantized)
    assert output[1].shape == (rows, -(-out_features // precision.GROUP))
    assert_quantized_alike(output, expected, steps=1e-3)


@pytest.mark.parametrize("quantized", QUANTIZED, ids=str)
def test_a_feed_forward_that_never_leaves_8_bits(quantized):
    x, first = randn(2, 3, 384, dtype=torch.float32, seed=0), randn(512, 384, dtype=torch.float32, seed=1) / 384**0.5
    second = randn(96, 512, dtype=torch.float32, seed=2) / 512**0.5
    bias = randn(512, dtype=torch.float32, seed=3)
    weights = [ops.quantize_rows(weight, quantized) for weight in (first, second)]
    hidden = ops.quantize_rows(x, quantized, impl="triton")
    hidden = ops.scaled_linear(*hidden, *weights[0], bias, "gelu_tanh", quantized, impl="triton")
    output = ops.scaled_linear(*hidden, *weights[1], out_dtype=torch.float16, impl="triton")
    exact = F.gelu(F.linear(x.double(), first.double(), bias.double()), approximate="tanh") @ second.double().T
    assert output.shape == (2, 3, 96) and snr(output, exact) >= FLOOR[quantized] - 3  # two layers, twice the noise


@pytest.mark.parametrize("quantized", QUANTIZED, ids=str)
@pytest.mark.parametrize("grouped", [False, True])
def test_signal_to_noise(grouped, quantized):
    # The depth of CogVideoX-2b's second feed-forward layer.
    operands, _ = layer(16, 24, 7680, quantized, grouped)
    output = ops.scaled_linear(*operands, out_dtype=torch.bfloat16, impl="triton")
    x, weight = randn(16, 7680, dtype=torch.float32, seed=0), randn(24, 7680, dtype=torch.float32, seed=1)
    assert snr(output, x.double() @ weight.double().T) >= FLOOR[quantized]


@pytest.mark.parametrize("kind", kernels.CONFIGS, ids=str)
def test_every_configuration_gives_the_same(kind, monkeypatch):
    quantized, grouped = kind
    operands, bias = layer(140, 270, 300, quantized, grouped)
    expected = ops.scaled_linear(*operands, bias, None, torch.float32)
    numbers = ops.scaled_linear(*operands, bias, None, quantized)
    kernel = kernels.KERNELS[kind]
    tiles = {tuple(c.kwargs.values()): c for cs in kernel.configs.values() for c in cs}
    for config in tiles.values():
        assert config.kwargs["BLOCK_N"] % precision.GROUP == 0
        assert precision.GROUP % config.kwargs["BLOCK_K"] == 0 or not grouped
        monkeypatch.setattr(kernel, "configs", {target: [config] for target in kernel.configs})
        output = ops.scaled_linear(*operands, bias, None, torch.float32, impl="triton")
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-4)
        assert_quantized_alike(ops.scaled_linear(*operands, bias, None, quantized, impl="triton"), numbers, steps=1e-3)


@pytest.mark.parametrize("quantized", QUANTIZED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "sequence", "dim", "text"), [(1, 1, 8, 1), (2, 7, 24, 3), (3, 5, 33, 0)])
def test_norms_into_8_bits(batch, sequence, dim, text, dtype, quantized):
    def stream(*shape, seed):
        return guarded(randn(*shape, dtype=dtype, seed=seed))

    x, y = guarded(stream(batch, sequence, dim, seed=0) * 3 + 1), stream(batch, sequence, dim, seed=1)
    shift, scale, gate = stream(batch, 2, 3, dim, seed=2).unbind(2)
    weight, bias = stream(dim, seed=3), stream(dim, seed=4)
    norm = (weight, bias, shift, scale, text, 1e-5)
    output = ops.layer_norm_modulate(x, *norm, "triton", quantize=quantized)
    assert_quantized_alike(output, ops.layer_norm_modulate(x, *norm, quantize=quantized), steps=5e-3)
    residual, *output = ops.gated_residual_layer_norm_modulate(x, y, gate, *norm, "triton", quantize=quantized)
    assert torch.equal(residual, ops.gated_residual(x, y, gate, text, "triton"))
    assert_quantized_alike(output, ops.layer_norm_modulate(residual, *norm, quantize=quantized), steps=5e-3)
    truth = ops.layer_norm_modulate(*(t.double() for t in (residual, *norm[:4])), text)
    if dim > 8:
        assert snr(restored(*output), truth) >= FLOOR[quantized] + 2  # one rounding and not two


def test_a_norm_that_is_not_finite():
    x, vectors = randn(1, 4, 16, dtype=torch.float16, seed=0), torch.zeros(1, 2, 16, dtype=torch.float16)
    x[0, 2, 3] = float("inf")
    numbers, scales = ops.layer_norm_modulate(x, None, None, vectors, vectors, 1, impl="triton", quantize=torch.int8)
    assert scales[0].isnan().tolist() == [False, False, True, False] and (numbers[0, 2] == 0).all()


def test_refusals():
    x, scale = torch.zeros(4, 256, dtype=torch.int8), torch.ones(4)
    weight, channels = torch.zeros(8, 256, dtype=torch.int8), torch.ones(8)
    with pytest.raises(ValueError, match=r"x_scale must be float32 \(4,\) or \(4, 2\), got torch.float32 \(3,\)"):
        ops.scaled_linear(x, scale[:3], weight, channels, impl="triton")
    with pytest.raises(ValueError, match=r"weight must have the dtype of x, torch.int8, got torch.float8_e4m3fn"):
        ops.scaled_linear(x, scale, weight.to(torch.float8_e4m3fn), channels, impl="triton")
    with pytest.raises(ValueError, match=r"weight_scale must be float32 \(8,\)"):
        ops.scaled_linear(x, scale, weight, channels.double(), impl="triton")
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., in_features\) and weight"):
        ops.scaled_linear(x[:, :128], scale, weight, channels, impl="triton")
    with pytest.raises(ValueError, match=r"bias must be \(8,\)"):
        ops.scaled_linear(x, scale, weight, channels, channels[:4], impl="triton")
    with pytest.raises(ValueError, match=r"activation must be one of None, 'gelu_tanh'.* got 'silu'"):
        ops.scaled_linear(x, scale, weight, channels, None, "silu", impl="triton")
    with pytest.raises(ValueError, match=r"x must be torch.int8 or torch.float8_e4m3fn, got torch.uint8"):
        ops.scaled_linear(x.to(torch.uint8), scale, weight, channels, impl="triton")
    with pytest.raises(ValueError, match="contiguous weight"):
        ops.scaled_linear(x, scale, weight.T.contiguous().T, channels, impl="triton")
    with pytest.raises(ValueError, match="at least one column"):
        ops.quantize_rows(torch.zeros(3, 0), torch.int8, impl="triton")
    with pytest.raises(ValueError, match=r'impl="cpu" does not quantize'):
        vectors = torch.zeros(1, 2, 8)
        ops.layer_norm_modulate(torch.zeros(1, 4, 8), None, None, vectors, vectors, 1, impl="cpu", quantize=torch.int8)


def test_e4m3_is_refused_where_it_cannot_be_multiplied(monkeypatch):
    reason = "NVIDIA A100 has compute capability 8.0, it needs 8.9"
    monkeypatch.setattr(checks, "why_not_e4m3", lambda device: reason)
    x = torch.ones(2, 128)
    with pytest.raises(ValueError, match=f"dtype=torch.float8_e4m3fn: {reason}; torch.int8 works there"):
        ops.quantize_rows(x, torch.float8_e4m3fn, impl="triton")
    pair = ops.quantize_rows(x, torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=reason):
        ops.scaled_linear(*pair, *pair, impl="triton")
    ops.quantize_rows(x, torch.int8, impl="triton")
