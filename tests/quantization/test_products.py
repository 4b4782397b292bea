"""Our int8 products against torchao's own, on the same weights."""

import copy

import pytest
import torch
from cogvx_kernels._triton import why_unavailable as why_not_triton
from cogvx_kernels.w8a8_linear import cpu as int8

from cogvx_fast import EngineConfig, accelerate
from cogvx_fast.bench.accuracy import snr_db
from cogvx_fast.quantization import RECIPES, Scheme
from cogvx_fast.quantization.apply import quantize_modules, quantize_transformer
from cogvx_fast.quantization.recipes import Target, why_no_native_products
from cogvx_fast.transformer import FastCogVideoXTransformer3DModel
from cogvx_fast.transformer.linear import Int8FeedForward, Int8Linear, QuantizedWeight
from tests import toy
from tests.generation import bound, plain, relative, run, session

needs_int8 = pytest.mark.skipif(int8.why_unavailable() is not None, reason=str(int8.why_unavailable()))


def quantized(variant="2b", recipe="int8", dtype=torch.float32):
    exact = toy.transformer(variant).to(dtype)
    model = FastCogVideoXTransformer3DModel.adopt(copy.deepcopy(exact))
    quantize_transformer(model, RECIPES[recipe])
    return exact, model


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["2b", "1.5-5b-i2v"])
def test_both_products_are_as_far_from_exact(variant, dtype):
    exact, model = quantized(variant, dtype=dtype)
    ours, torchaos = session(model, recipe="int8"), session(model, recipe="int8", gemm="torchao")
    expected = plain(exact, ours, dtype=dtype)
    with ours.active():
        own = run(model, ours, dtype=dtype)
        forms = [(type(how.qkv), type(how.out), type(how.ff)) for how in bound(model, ours)]
    with torchaos.active():
        theirs = run(model, torchaos, dtype=dtype)
        assert all(how.qkv is how.out is how.ff is None for how in bound(model, torchaos))
    assert forms == [(Int8Linear, Int8Linear, Int8FeedForward)] * 3
    assert relative(own, expected) <= 1.1 * relative(theirs, expected)
    # Two roundings of the same numbers, each as far from the truth: no further from each other than they could be.
    assert relative(own, theirs) <= 2 * relative(theirs, expected)


@needs_int8
def test_one_linear_gives_torchaos_numbers_within_the_rounding_of_its_activations():
    _, model = quantized()
    linear = model.transformer_blocks[0].ff.net[2]
    x = torch.randn(2, 7, linear.in_features)
    with (current := session(model, recipe="int8")).active():
        run(model, current)
        form = bound(model, current)[0].ff
    ours = Int8Linear((form.second,), form.buffer)(x)
    expected = torch.nn.functional.linear(x, linear.weight.dequantize(), linear.bias)
    with torch.no_grad():
        assert relative(ours, expected) <= 1.1 * relative(linear(x), expected)


@needs_int8
@pytest.mark.parametrize("outliers", [1, 30])
def test_outliers_cost_what_rounding_to_the_rows_largest_value_must(outliers):
    linear = torch.nn.Linear(1920, 256).requires_grad_(False)
    x = torch.randn(64, 1920)
    x[:, ::200] *= outliers
    expected, predicted = linear(x), rounding_error(x, linear.weight, linear.bias)
    quantize_modules(torch.nn.ModuleDict({"linear": linear}), lambda name: Scheme.INT8)
    ours = relative(Int8Linear((QuantizedWeight.of(linear),), torch.empty(0, dtype=torch.int32))(x), expected)
    assert ours == pytest.approx(relative(linear(x), expected), rel=0.03)
    assert ours == pytest.approx(predicted, rel=0.04)  # 60 draws: within 2%; 41 dB without outliers, 25 with
    assert outliers > 1 or snr_db(ours) > 35


def rounding_error(x, weight, bias):
    """The expected relative error of a product of rows rounded to steps of their largest value / 127.

    A step s makes an error of variance s² / 12 (Widrow and Kollár, Quantization Noise, 2008), independent per element.
    """
    of_x, of_weight = (((t.abs().amax(1) / 127) ** 2 / 12).mean() for t in (x, weight))
    noise = of_x * weight.square().sum(1).mean() + of_weight * x.square().sum(1).mean()
    return float((noise / torch.nn.functional.linear(x, weight, bias).square().mean()).sqrt())


@needs_int8
def test_no_copy_of_the_weights_is_made_and_one_buffer_serves_all():
    _, model = quantized()
    with (current := session(model, recipe="int8")).active():
        run(model, current)
        hows = bound(model, current)
        for block, how in zip(model.transformer_blocks, hows, strict=True):
            assert how.ran().packed_bytes == 0
            assert how.qkv.weights[2].values.data_ptr() == block.attn1.to_v.weight.qdata.data_ptr()
        assert len({how.ff.buffer.data_ptr() for how in hows}) == 1
        larger = run(model, current, height=8, width=8)  # more rows than the buffer was made for
    assert torch.equal(larger, run(model, session(model, recipe="int8"), height=8, width=8))


@needs_int8
def test_replaced_weights_are_noticed():
    _, model = quantized()
    with (current := session(model, recipe="int8")).active():
        before = run(model, current)
        other = quantized()[1].transformer_blocks[1]
        model.transformer_blocks[0].ff.net[2].weight = other.ff.net[2].weight
        after = run(model, current)
    assert torch.equal(after, run(model, session(model, recipe="int8"))) and relative(after, before) > 1e-3
    assert current.ran.counts["bindings"] == 2


@pytest.mark.parametrize("recipe", ["int8-weight", "fp8-weight"])
def test_weight_only_linears_are_called(recipe):
    exact, model = quantized(recipe=recipe)
    with (current := session(model, recipe=recipe)).active():
        output = run(model, current)
        assert all(how.qkv is how.out is how.ff is None for how in bound(model, current))
    assert 1e-4 < relative(output, plain(exact, current)) < 0.1


def test_native_products_are_refused_where_there_are_none():
    fast = accelerate(toy.pipeline(), EngineConfig(recipe="fp8-weight", gemm="native"))
    with pytest.raises(
        ValueError, match=r"gemm='native' cannot work here: .*'int8' alone.*what can: 'auto', 'torchao'"
    ):
        fast(**toy.inputs())


@pytest.mark.parametrize(
    ("recipe", "capability", "reason"),
    [
        ("int8", (8, 0), why_not_triton()),
        ("fp8", (8, 9), why_not_triton()),
        ("int8", (7, 5), "they need compute capability 8.0 or newer; this is a T4"),
        ("int8-weight", (9, 0), "on a GPU there are some for recipes 'int8' and 'fp8' alone, not for 'int8-weight'"),
    ],
)
def test_what_gpus_have_products_of_our_own(recipe, capability, reason):
    assert why_no_native_products(RECIPES[recipe], Target("cuda", "a T4", capability)) == reason


@needs_int8
def test_the_report_names_the_products():
    fast = accelerate(toy.pipeline(), EngineConfig(recipe="int8"))
    fast(**toy.inputs(num_steps=1, output_type="latent"))
    assert "int8 products of our own in 3" in str(fast.engine_report())


@pytest.mark.slow
def test_compiled_blocks_run_torchaos_products_and_give_the_same_numbers():
    exact, model = quantized()
    compiled = session(model, compile="blocks", recipe="int8")
    called = session(model, recipe="int8", gemm="torchao")
    torch._dynamo.reset()
    with compiled.active():
        output = run(model, compiled)
        assert all(how.qkv is how.ff is None for how in bound(model, compiled))
    expected = run(model, called)
    torch._dynamo.reset()
    truth = plain(exact, compiled)
    assert relative(output, truth) <= 1.1 * relative(expected, truth)
    assert relative(output, expected) < relative(expected, truth)
