"""Contenders at toy size: what they run, that they share weights, and what they say of themselves."""

import pytest
import torch
from torch import nn

from cogvx_fast.bench.contenders import CONTENDERS, block_linears, diffusers_compiled, packed_linear
from cogvx_fast.bench.recipes import Recipes
from cogvx_fast.bench.reference import build_pipeline, shapes
from tests import toy


@torch.no_grad()
def test_the_bound_runs_the_linears_and_the_attention_of_the_step_on_its_shapes(toy_step, monkeypatch):
    pipe = build_pipeline(toy_step, torch.float32, torch.device("cpu"))
    linears = [linear for block in pipe.transformer.transformer_blocks for linear in block_linears(block)]
    seen, attention = [], []
    for linear in [*linears, pipe.transformer.proj_out]:
        linear.register_forward_hook(lambda module, inputs, output: seen.append((module, inputs[0].shape[0])))
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value):
        attention.append(query.shape)
        return original(query, key, value)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    whole = CONTENDERS["arithmetic"].build(pipe, toy_step, "dit-step")
    whole.call(0)
    size = shapes(toy_step, pipe)
    rows = 2 * size["tokens"]
    assert seen == [*((linear, rows) for linear in linears), (pipe.transformer.proj_out, 2 * size["video_tokens"])]
    assert attention == [(2, size["heads"], size["tokens"], size["head_dim"])] * size["layers"]
    seen.clear()
    part = CONTENDERS["attention"].build(pipe, toy_step, "dit-step")
    part.call(0)
    assert seen == [] and len(attention) == 2 * size["layers"]
    assert set(whole.extras) == {"linear_flop", "attention_flop"} and set(part.extras) == {"attention_flop"}


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_packed_weights_compute_the_same(dtype):
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bf16 on this CPU")
    linear, x = nn.Linear(48, 32).to(dtype), torch.randn(20, 48).to(dtype)
    difference = (packed_linear(linear, 20)(x).float() - linear(x).float()).abs().max()
    assert difference <= 4 * torch.finfo(dtype).eps * linear(x).float().abs().max()


def test_recipes_share_unchanged_weights_and_round_alike():
    pipe = toy.pipeline()
    expected = pipe(**toy.inputs(num_steps=1, output_type="latent")).frames
    contenders = Recipes.choices()
    pipes = [contenders[name].build(pipe, None, "dit-step").pipeline for name in ("ours-int8", "diffusers-int8")]
    errors = []
    for quantized in pipes:
        output = quantized(**toy.inputs(num_steps=1, output_type="latent")).frames
        errors.append(((output - expected).norm() / expected.norm()).item())
    assert all(1e-3 < error < 0.05 for error in errors)
    assert torch.equal(pipe(**toy.inputs(num_steps=1, output_type="latent")).frames, expected)


def test_recipes_say_what_their_weights_take():
    pipe = toy.pipeline()
    contenders, held = Recipes.choices(), {}
    for name in ("diffusers", "ours", "ours-int8", "diffusers-int8", "diffusers-int8-compile-freeze"):
        held[name] = contenders[name].build(pipe, None, "dit-step").late_extras()["weights_bytes"]
    assert held["diffusers"] == held["ours"] == sum(p.numel() * 4 for p in pipe.transformer.parameters())
    assert held["ours-int8"] == held["diffusers-int8"] == held["diffusers-int8-compile-freeze"] < held["ours"]


def test_freezing_ends_when_compiling_fails():
    import torch._inductor.config

    prepared = diffusers_compiled(toy.pipeline(), None, "dit-step", freezes=True)
    with pytest.raises(RuntimeError), prepared.compiling():
        assert torch._inductor.config.freezing
        raise RuntimeError
    assert not torch._inductor.config.freezing
