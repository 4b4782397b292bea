"""Attention with Q and K in 8 bits as Triton kernels, interpreted: signal to noise against attention in fp64.

The signal is what differs from V's mean: a large offset that all outputs share would hide any noise.
"""

import pytest
import torch
from cogvx_kernels import ops
from cogvx_kernels.int8_attention import reference
from cogvx_kernels.int8_attention import triton as kernels

from tests.kernels.budget import randn
from tests.kernels.triton_operations import operation

from .conftest import guarded

FP8 = torch.float8_e4m3fn
# batch, queries, keys, heads, head_dim: one of each, tails of queries, of keys and of blocks, more blocks than one.
SHAPES = [
    (1, 1, 1, 1, 64),
    (2, 5, 3, 2, 64),
    (1, 130, 64, 1, 64),
    (3, 17, 200, 1, 64),
    (1, 9, 129, 1, 128),
    (1, 128, 65, 2, 128),
]
CASES = [*((shape, torch.float16) for shape in SHAPES), (SHAPES[1], torch.bfloat16), (SHAPES[4], torch.bfloat16)]
FLOOR = 30.0
# e4m3 has 3 bits behind the point: 31.7 dB for V and as much for the probabilities, against a signal that holds the
# mean as well, which here it does not.
FP8_FLOOR = 25.0


def inputs(batch, queries, keys, heads, head_dim, dtype, key_offset=0.0, value_offset=0.0):
    """Q, K and V; K and V as they lie in a packed projection, offsets a random number for each channel."""
    query = guarded(randn(batch, queries, heads, head_dim, dtype=dtype, seed=0))
    packed = randn(batch, keys, 3, heads, head_dim, dtype=torch.float32, seed=1)
    packed[:, :, 1] += key_offset * randn(heads, head_dim, dtype=torch.float32, seed=2)
    packed[:, :, 2] += value_offset * randn(heads, head_dim, dtype=torch.float32, seed=3)
    _, key, value = guarded(packed.to(dtype)).unbind(2)
    return query, key, value


def signal_to_noise(output, query, key, value, scale=None):
    """In dB."""
    truth = ops.attention(query.double(), key.double(), value.double(), scale)
    signal = (truth - value.double().mean(1, keepdim=True)).norm()
    return 20 * torch.log10(signal / (output.double() - truth).norm()).item()


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_quantize_qk_is_the_formula(shape, dtype):
    query, key, _ = inputs(*shape, dtype=dtype, key_offset=3)
    key = guarded(key.transpose(1, 2)).transpose(1, 2)  # heads before tokens
    expected = ops.quantize_qk(query, key, 0.3)
    output = ops.quantize_qk(query, key, 0.3, impl="triton")
    for got, truth in zip(output, expected, strict=True):
        assert got.shape == truth.shape and got.dtype == truth.dtype
    assert torch.equal(output[0], expected[0]) and torch.equal(output[1], expected[1])
    # Sums of K are taken in another order: a number half way between two integers may go either way.
    assert (output[2].int() - expected[2].int()).abs().max() <= 1
    assert (output[2] != expected[2]).float().mean() < 0.01
    torch.testing.assert_close(output[3], expected[3], rtol=2**-10, atol=0)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_quantize_value_is_the_formula(shape, smooth, dtype):
    *_, value = inputs(*shape, dtype=dtype, value_offset=3)
    for target in (FP8, *((dtype,) if smooth else ())):
        expected = reference.quantize_value(value, target, smooth)
        output = operation("quantize_value")(value, target, smooth)
        # One step of the target where the mean's last bit decides.
        assert output[0].dtype == target and output[0].shape == value.shape
        difference = (output[0].float() - expected[0].float()).abs()
        assert (difference <= torch.finfo(target).eps * expected[0].float().abs() + 1e-3).all()
        assert (difference > 0).float().mean() < 0.02
        for got, truth in zip(output[1:], expected[1:], strict=True):
            if truth is not None:
                torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-5)


SMOOTH, SMOOTH_FP8 = {"smooth_value": True}, {"smooth_value": True, "value_dtype": FP8}
OFFSETS = (40, 4)  # of K and of V, in deviations


@pytest.mark.parametrize(
    ("shape", "dtype", "offsets", "options"),
    [
        *((shape, torch.float16, offsets, {}) for shape in SHAPES for offsets in ((0, 0), OFFSETS)),
        *((SHAPES[n], torch.float16, OFFSETS, options) for n in (2, 4) for options in (SMOOTH, SMOOTH_FP8)),
        *((SHAPES[n], torch.bfloat16, (0, 0), options) for n in (1, 4) for options in ({}, SMOOTH_FP8)),
    ],
)
def test_noise_is_that_of_the_formula(shape, dtype, offsets, options):
    arguments = inputs(*shape, dtype, *offsets)
    output = ops.int8_attention(*arguments, **options, impl="triton")
    formula = ops.int8_attention(*arguments, **options)
    assert output.shape == arguments[0].shape and output.dtype == dtype
    if shape[2] == 1:  # V itself, whatever the scores
        torch.testing.assert_close(output, formula, rtol=1e-2, atol=1e-3)
        return
    got, own = (signal_to_noise(o, *arguments) for o in (output, formula))
    assert got >= own - 1, f"{got:.1f} dB, the formula's {own:.1f} dB"
    assert min(got, own) >= (FP8_FLOOR if "value_dtype" in options else FLOOR), f"{got:.1f} dB"


def test_offsets_break_what_is_not_smoothed():
    """Were these above their floors, the floors above would show nothing."""
    query, key, value = inputs(1, 40, 200, 1, 64, torch.float16, *OFFSETS)
    naive = [reference.quantize_blocks(query, 64**-0.5 * reference.LOG2_E), reference.quantize_blocks(key, 1.0)]
    quantized = [tensor for pair in naive for tensor in pair]
    output = kernels.int8_attention(*quantized, value, None, None, None, torch.float16)
    assert signal_to_noise(output, query, key, value) < FLOOR - 5
    smooth, rough = (
        ops.int8_attention(query, key, value, value_dtype=FP8, smooth_value=smooth, impl="triton")
        for smooth in (True, False)
    )
    assert signal_to_noise(smooth, query, key, value) >= FP8_FLOOR > signal_to_noise(rough, query, key, value) + 5


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("value_dtype", [None, FP8], ids=str)
def test_every_configuration_meets_the_floor(head_dim, value_dtype, monkeypatch):
    arguments = inputs(1, 131, 300, 1, head_dim, torch.float16)
    kernel = kernels.KERNELS[head_dim, value_dtype is FP8]
    choices = {str(c): c for configs in kernel.configs.values() for c in configs}.values()
    # As the formula has it, tile by tile: warps and stages are nothing to the interpreter.
    for config in {tuple(c.kwargs.items()): c for c in choices}.values():
        monkeypatch.setattr(kernel, "configs", {target: [config] for target in kernel.configs})
        output = ops.int8_attention(*arguments, value_dtype=value_dtype, impl="triton")
        assert signal_to_noise(output, *arguments) >= (FLOOR if value_dtype is None else FP8_FLOOR), str(config)


def test_the_largest_sums_are_exact():
    """All products at their largest, of both signs: 2,064,512 of the 4,194,304 that the trick with the bits allows."""
    ones = torch.ones(1, 40, 1, 128, dtype=torch.int8)
    query, key = ones * 127, ones * torch.where(torch.arange(40) % 3 == 0, 127, -127)[:, None, None].to(torch.int8)
    # A score of exactly 8 for a third of the keys, and -8 for the others.
    unit = torch.full((1, 1, 1), 2.0**-9)
    scale = torch.full((1, 1, 1), 2.0**-9)
    value = guarded(randn(1, 40, 1, 128, dtype=torch.float16, seed=0))
    output = kernels.int8_attention(query, unit, key, scale, value, None, None, None, torch.float16)
    exponents = (query[0, 0, 0].long() * key[0, :, 0].long()).sum(-1) * 2.0**-18
    weights = torch.exp2((exponents - exponents.max()).double())
    expected = (weights @ value[0, :, 0].double()) / weights.sum()
    torch.testing.assert_close(output[0, :, 0].double(), expected.expand(40, -1), rtol=2e-3, atol=2e-3)


def test_scores_of_a_thousand():
    """A float beside 1.5 * 2^23 has steps of 1: what is subtracted with it may not be rounded to them."""
    query, key, value = inputs(1, 70, 150, 1, 64, torch.float16)
    for factor in (10, 100):
        arguments = (query * factor, key, value)
        got, own = (
            signal_to_noise(ops.int8_attention(*arguments, impl=impl), *arguments) for impl in ("triton", "torch")
        )
        assert got >= own - 0.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", range(3))
def test_what_is_not_finite_is_not_lost(which, bad):
    arguments = inputs(1, 150, 140, 2, 64, torch.float16)
    arguments[which][0, 3, 1, 5] = bad
    output = ops.int8_attention(*arguments, impl="triton")
    spoilt = ~output[0, :, 1].isfinite()
    # Of Q one block of rows, of K all, of V all in one channel.
    assert (
        (spoilt[:128].all() and not spoilt[128:].any())
        if which == 0
        else spoilt.all()
        if which == 1
        else spoilt[:, 5].all()
    )
    assert output[0, :, 0].isfinite().all()


def guard():
    return torch.zeros(1, dtype=torch.int32)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("options", [{}, SMOOTH_FP8], ids=["fp16", "fp8"])
def test_guard(options, impl):
    arguments = inputs(2, 5, 70, 1, 64, torch.float16)
    flag = guard()
    output = ops.int8_attention(*arguments, **options, guard=flag, impl=impl)
    assert flag.tolist() == [0] and output.isfinite().all()
    assert torch.equal(output, ops.int8_attention(*arguments, **options, impl=impl))
    for which in range(3):
        broken = [tensor.clone() for tensor in arguments]
        broken[which][1, -1, 0, 63] = float("inf")
        flag = guard()
        assert not ops.int8_attention(*broken, **options, guard=flag, impl=impl).isfinite().all()
        assert flag.tolist() == [1]
        ops.int8_attention(*arguments, **options, guard=flag, impl=impl)
        assert flag.tolist() == [1]  # until the caller clears it


def test_guard_sees_an_overflow_of_the_output():
    *quantized, _ = *operation("quantize_qk")(*inputs(1, 5, 40, 1, 64, torch.float16)[:2], 0.18), None
    value = torch.full((1, 40, 1, 64), 60000.0, dtype=torch.float16)
    mean, flag = torch.zeros(1, 1, 64), guard()
    kernels.int8_attention(*quantized, value, None, mean, flag, torch.float16)
    assert flag.tolist() == [0]
    mean[0, 0, 7] = 10000.0  # the sum is finite in fp32, and not in fp16
    output = kernels.int8_attention(*quantized, value, None, mean, flag, torch.float16)
    assert flag.tolist() == [1] and output[..., 7].isinf().all()


def test_heads_before_tokens_and_a_scale():
    arguments = [guarded(randn(2, 3, 9, 64, dtype=torch.float16, seed=seed)).transpose(1, 2) for seed in range(3)]
    for options in ({}, {"value_dtype": FP8}):
        got, own = (
            signal_to_noise(ops.int8_attention(*arguments, 0.3, **options, impl=impl), *arguments, 0.3)
            for impl in ("triton", "torch")
        )
        assert got >= own - 1 and got > 20


def test_refusals():
    x = torch.zeros(1, 4, 2, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"must be all torch\.float16 or all torch\.bfloat16, got torch\.float32"):
        ops.int8_attention(x.float(), x.float(), x.float())
    with pytest.raises(ValueError, match="takes head dims 64, 128, got 32"):
        ops.int8_attention(x[..., :32], x[..., :32], x[..., :32], impl="triton")
    with pytest.raises(ValueError, match=r"scale must be positive, got -1\.0"):
        ops.int8_attention(x, x, x, -1.0)
    with pytest.raises(ValueError, match="at least one key"):
        ops.int8_attention(x, x[:, :0], x[:, :0])
    with pytest.raises(ValueError, match=r"value_dtype=torch\.float32 must be that of value"):
        ops.int8_attention(x, x, x, value_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"guard must be one torch\.int32 on cpu, got 2 of torch\.int32 on cpu"):
        ops.int8_attention(x, x, x, guard=torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"quantized_attention: Q must be .* blocks of 128 rows"):
        quantized = ops.quantize_qk(x, x)
        ops.quantized_attention(quantized[0], quantized[1][..., None], *quantized[2:], x)
    with pytest.raises(ValueError, match=r"must be torch\.int8, .* got torch\.float16"):
        ops.quantized_attention(x, *quantized[1:], x)
    with pytest.raises(ValueError, match="impl='amx' is unknown to int8_attention; allowed: 'torch', 'triton'"):
        ops.int8_attention(x, x, x, impl="amx")
