"""Quantized pipelines: what is quantized, what it is shared with, and what the report says of it."""

import pytest
import torch

from cogvx_fast import EngineConfig, FastCogVideoXPipeline, accelerate
from cogvx_fast.quantization import RECIPES, recipes
from cogvx_fast.quantization import pipeline as quantization
from cogvx_fast.quantization.apply import quantize_transformer, quantized_names, shared_copy
from cogvx_fast.quantization.recipes import Target
from tests import toy

ON_CPU = ("int8", "int8-weight", "fp8-weight")


def report_line(pipe, name="quantize"):
    return next(line for line in pipe.engine_report().lines if line.name == name)


def relative(output, expected):
    return ((output - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("recipe", ON_CPU)
def test_the_original_pipeline_is_left_as_it_is(recipe):
    original = toy.pipeline("5b")
    inputs = {"output_type": "latent", "num_steps": 2}
    before = original(**toy.inputs(**inputs)).frames
    exact = accelerate(original)
    fast = accelerate(exact, EngineConfig(recipe=recipe))  # of a fast one too
    assert len(list(quantized_names(fast.transformer))) == 6 * 3
    assert len(list(quantized_names(fast.text_encoder))) == 7
    for pipe in (original, exact):
        assert not [*quantized_names(pipe.transformer), *quantized_names(pipe.text_encoder)]
    error = relative(fast(**toy.inputs(**inputs)).frames, before)
    assert 1e-4 < error < 0.1  # it was quantized, and is no other model
    assert torch.equal(original(**toy.inputs(**inputs)).frames, before)
    shared = fast.transformer.proj_out.weight
    assert shared is original.transformer.proj_out.weight


def test_the_report_says_what_was_quantized_and_the_bytes():
    original = toy.pipeline()
    line = report_line(accelerate(original, EngineConfig(recipe="int8", text_encoder="native")))
    weights = sum(
        p.numel() for n, p in original.transformer.named_parameters() if n.endswith("weight") and _in_blocks(n)
    )
    channels = sum(len(p) for n, p in original.transformer.named_parameters() if n.endswith("weight") and _in_blocks(n))
    after = weights + channels * 5  # fp32 scales and torchao's zero points of a byte
    assert (
        line.applied and f"transformer: 18 linears, {weights * 4 / 1e6:.1f} MB to {after / 1e6:.1f} MB" in line.detail
    )
    assert "text encoder as it is" in line.detail
    line = report_line(accelerate(original))
    assert not line.applied and "'exact' changes no precision" in line.detail


def _in_blocks(name):
    return RECIPES["int8"].scheme_of(name.removesuffix(".weight")) is not None


def test_balanced_is_named_or_says_why_it_changes_nothing(monkeypatch):
    monkeypatch.setattr(quantization, "targets", lambda: [Target("cpu", "a CPU with units", int8_units="units")])
    assert (
        "balanced is int8 on a CPU with units in float32" in report_line(accelerate(toy.pipeline(), "balanced")).detail
    )
    monkeypatch.setattr(quantization, "targets", lambda: [Target("cpu", "a slow CPU")])
    fast = accelerate(toy.pipeline(), "balanced")
    assert "nothing: on a slow CPU 8 bits would gain no time" in report_line(fast).detail
    assert not list(quantized_names(fast.transformer))


def test_a_recipe_that_no_device_can_run_is_refused_before_loading():
    with pytest.raises(ValueError, match=r"recipe='fp8' cannot work here: .*; what can: 'int8'"):
        FastCogVideoXPipeline.from_pretrained("no/such/checkpoint", engine=EngineConfig(recipe="fp8"))


def test_a_generation_on_a_device_that_cannot_run_it_is_refused(monkeypatch):
    monkeypatch.setattr(quantization, "targets", lambda: [Target("cuda", "a GPU (8.9)", (8, 9))])
    monkeypatch.setattr(recipes.Scheme, "torchao_config", lambda self: RECIPES["int8"].schemes[0].torchao_config_of())
    monkeypatch.setattr(recipes.Scheme, "torchao_config_of", _int8, raising=False)
    fast = accelerate(toy.pipeline().to(torch.bfloat16), EngineConfig(recipe="fp8"))
    with pytest.raises(ValueError, match=r"recipe='fp8' cannot work here: .*this is a CPU"):
        fast(**toy.inputs())


def _int8(scheme):
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(version=2, set_inductor_config=False)


def test_what_is_quantized_stays_so():
    fast = accelerate(toy.pipeline(), EngineConfig(recipe="int8"))
    again = accelerate(fast, "balanced")
    assert "quantized before" in report_line(again).detail
    assert (
        again.transformer.transformer_blocks[0].ff.net[2].weight
        is fast.transformer.transformer_blocks[0].ff.net[2].weight
    )
    with pytest.raises(
        ValueError, match=r"recipe='int8-weight': the transformer is quantized already, by recipe 'int8'"
    ):
        accelerate(fast, EngineConfig(recipe="int8-weight"))
    with pytest.raises(ValueError, match=r"the transformer is quantized \(int8\).*use engine='balanced'"):
        accelerate(fast)


def test_what_others_quantized_is_refused_and_runs_exact():
    original = toy.pipeline()
    quantize_transformer(original.transformer, RECIPES["int8-weight"])
    with pytest.raises(ValueError, match=r"attn1\.to_q is quantized already \(Int8Tensor\)"):
        accelerate(original, EngineConfig(recipe="int8"))
    inputs = {"output_type": "latent", "num_steps": 1}
    expected = original(**toy.inputs(**inputs)).frames
    assert relative(accelerate(original)(**toy.inputs(**inputs)).frames, expected) < 1e-4


def test_offloading_comes_after():
    original = toy.pipeline()
    original.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ValueError, match="has offloading hooks already; make the pipeline fast first"):
        accelerate(original, EngineConfig(recipe="int8"))
    with pytest.raises(ValueError, match=r"attn1\.to_q is offloaded: quantize first, then enable offloading"):
        quantize_transformer(original.transformer, RECIPES["int8"])


def test_a_shared_copy_keeps_modules_that_occur_twice():
    linear = torch.nn.Linear(4, 4)
    original = torch.nn.ModuleDict({"first": linear, "second": torch.nn.Sequential(linear)})
    new = shared_copy(original)
    assert new["first"] is new["second"][0] and new["first"] is not linear
    assert new["first"].weight is linear.weight
    new["first"].weight = torch.nn.Parameter(torch.zeros(4, 4))
    new["first"].register_forward_hook(lambda *_: None)
    assert linear.weight.abs().sum() > 0 and not linear._forward_hooks
