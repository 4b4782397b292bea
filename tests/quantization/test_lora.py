"""Adapters beside quantized weights, in full precision, and fused before the weights are quantized."""

import pytest
import torch
from cogvx_kernels.w8a8_linear import cpu as int8
from peft import LoraConfig, get_peft_model_state_dict

from cogvx_fast import EngineConfig, accelerate
from cogvx_fast.quantization.apply import quantized_names
from tests import toy

TARGETS = ["to_q", "to_v", "ff.net.2"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two of them, as diffusers saves them."""
    folders = []
    for seed in (0, 1):
        donor, folder = toy.pipeline(), tmp_path_factory.mktemp("lora")
        torch.manual_seed(seed)
        donor.transformer.add_adapter(LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
        donor.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(donor.transformer))
        folders.append(folder)
    return folders


def load(pipe, adapters, weights):
    names = ["first", "second"]
    for name, folder in zip(names, adapters, strict=True):
        pipe.load_lora_weights(folder, adapter_name=name)
    pipe.set_adapters(names, weights)
    return pipe


def run(pipe):
    return pipe(**toy.inputs(num_steps=2, output_type="latent")).frames


def relative(output, expected):
    return ((output - expected).norm() / expected.norm()).item()


def quantization_error(recipe):
    plain = toy.pipeline()
    return relative(run(accelerate(plain, EngineConfig(recipe=recipe))), run(plain))


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear")
@pytest.mark.parametrize("recipe", ["int8", "int8-weight", "fp8-weight"])
@pytest.mark.parametrize("loaded", ["before", "after"])
def test_adapters_with_weights_run_in_full_precision_beside(adapters, recipe, loaded):
    budget = 2 * quantization_error(recipe)
    exact = load(toy.pipeline(), adapters, [2.0, -1.5])
    if loaded == "before":
        fast = accelerate(load(toy.pipeline(), adapters, [2.0, -1.5]), EngineConfig(recipe=recipe))
    else:
        fast = load(accelerate(toy.pipeline(), EngineConfig(recipe=recipe)), adapters, [2.0, -1.5])
    names = list(quantized_names(fast.transformer))
    assert "transformer_blocks.0.attn1.to_q.base_layer" in names and len(names) == 18
    expected = run(exact)
    assert relative(run(fast), expected) < budget < 0.5 * relative(expected, run(toy.pipeline()))
    lora = fast.transformer.transformer_blocks[0].attn1.to_q.lora_A["first"].weight
    assert type(lora) is torch.nn.Parameter and lora.dtype == torch.float32
    for pipe in (exact, fast):  # weights may change at any time
        pipe.set_adapters(["second"], [1.0])
    assert relative(run(fast), run(exact)) < budget


def test_the_pipeline_that_shares_the_adapters_keeps_its_weights(adapters):
    original = load(toy.pipeline(), adapters, [1.0, 0.5])
    before = run(original)
    accelerate(original, EngineConfig(recipe="int8"))
    assert not list(quantized_names(original.transformer)) and torch.equal(run(original), before)


@pytest.mark.parametrize("unload", [False, True])
def test_adapters_fused_before_are_quantized_with_the_weights(adapters, unload):
    exact = load(toy.pipeline(), adapters, [2.0, -1.5])
    expected = run(exact)
    exact.fuse_lora()
    if unload:
        exact.unload_lora_weights()
    fast = accelerate(exact, EngineConfig(recipe="int8"))
    assert relative(run(fast), expected) < 2 * quantization_error("int8")
    assert len(list(quantized_names(fast.transformer))) == 18
    if unload and int8.why_unavailable() is None:
        assert "int8 products of our own in 3" in str(fast.engine_report())


def test_what_is_quantized_cannot_be_fused_into():
    fast = accelerate(toy.pipeline(), EngineConfig(recipe="int8"))
    with pytest.raises(ValueError, match=r"adapters run beside them.*fuse_lora\(\) on the exact pipeline"):
        fast.fuse_lora()
