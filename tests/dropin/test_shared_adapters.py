"""Two pipelines on one set of weights: an adapter in one is known to both; files hold what they should."""

import io

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from cogvx_fast import EngineConfig, accelerate
from tests import toy

from .generations import assert_differs, assert_same, latents, line

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    donor, folder = toy.pipeline(), tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    donor.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "norm1.linear"], init_lora_weights=False))
    donor.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(donor.transformer))
    return folder


@pytest.fixture(scope="module")
def adapted(folder):
    pipe = toy.pipeline()
    pipe.load_lora_weights(folder, adapter_name="one")
    return latents(pipe)


def pairs():
    original = toy.pipeline()
    fast = accelerate(original)
    return {
        "original and ours": (original, fast),
        "ours and the original": (fast, original),
        "two of ours": (fast, accelerate(original)),
        "ours of ours": (fast, accelerate(fast, EngineConfig(modulation_table=False))),
    }


PAIRS = ("original and ours", "ours and the original", "two of ours", "ours of ours")


@pytest.mark.parametrize("pair", PAIRS)
def test_an_adapter_is_known_to_both(pair, folder, adapted):
    """Its layers are in modules that both have: who says there is none says what is not so."""
    first, second = pairs()[pair]
    plain = latents(second)
    first.load_lora_weights(folder, adapter_name="one")
    assert_same(latents(first), adapted)
    assert_same(latents(second), adapted)
    for pipe in (first, second):
        assert pipe.get_list_adapters() == {"transformer": ["one"]}
        assert pipe.get_active_adapters() == ["one"]
        assert list(pipe.transformer.peft_config) == ["one"]
    for pipe in (first, second):
        if hasattr(pipe, "engine_report"):
            assert line(pipe, "lora").applied and "one" in line(pipe, "lora").detail
    second.set_adapters("one", 0.0)
    assert_same(latents(second), plain)
    second.set_adapters("one", 1.0)
    if second.transformer is not first.transformer and hasattr(second, "engine_report"):
        with pytest.warns(UserWarning, match="one were loaded by another pipeline"):
            second.unload_lora_weights()  # takes away only its own
        assert second.get_list_adapters() == {"transformer": ["one"]}
        assert_same(latents(second), adapted)
    first.unload_lora_weights()
    for pipe in (second, first):
        assert not pipe.get_list_adapters().get("transformer")
        assert_same(latents(pipe), plain)


@pytest.mark.parametrize("pair", PAIRS)
def test_loaded_in_both_under_names_of_their_own(pair, folder, adapted):
    first, second = pairs()[pair]
    first.load_lora_weights(folder, adapter_name="one")
    second.load_lora_weights(folder, adapter_name="two")
    second.set_adapters(["one", "two"], [0.5, 0.5])
    assert_same(latents(first), adapted)
    first.delete_adapters("one")
    second.set_adapters("two", 1.0)
    assert second.get_list_adapters() == {"transformer": ["two"]}
    assert_same(latents(second), adapted)
    assert_same(latents(first), adapted)


def test_a_quantized_pipelines_adapters_are_its_own(folder):
    """Its linears are copies: unloading takes away its adapters, and the exact pipeline's stay."""
    original = toy.pipeline()
    exact, quantized = accelerate(original), accelerate(original, EngineConfig(recipe="int8"))
    plain, rough = latents(exact), latents(quantized)
    exact.load_lora_weights(folder, adapter_name="one")
    quantized.load_lora_weights(folder, adapter_name="two")
    with_adapter = latents(exact)
    assert_differs(with_adapter, plain)
    assert_differs(latents(quantized), rough)
    assert quantized.get_active_adapters() == ["two"]
    quantized.unload_lora_weights()
    assert_same(latents(quantized), rough)
    assert exact.get_active_adapters() == ["one"]
    assert_same(latents(exact), with_adapter)


def test_fusing_in_one_is_fused_in_both(folder, adapted):
    original = toy.pipeline()
    fast = accelerate(original)
    fast.load_lora_weights(folder, adapter_name="one")
    fast.fuse_lora()
    assert_same(latents(fast), adapted)
    assert_same(latents(original), adapted)
    original.unfuse_lora()
    original.unload_lora_weights()
    assert_same(latents(fast), latents(toy.pipeline()))


def test_the_report_follows_adapters(folder):
    fast = accelerate(toy.pipeline())
    assert not line(fast, "lora").applied
    fast.load_lora_weights(folder, adapter_name="one")
    assert line(fast, "lora").applied and "one" in line(fast, "lora").detail
    fast.disable_lora()
    latents(fast)
    assert "one" not in line(fast, "lora").detail or "disabled" in line(fast, "lora").detail
    fast.enable_lora()
    fast.unload_lora_weights()
    assert not line(fast, "lora").applied


def size_of(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getbuffer().nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("what", ["to_q", "to_k", "ff.net.2", "norm1.linear", "patch_embed.text_proj"])
def test_a_saved_layer_is_as_large_as_it_is(what, dtype):
    """Projections that are views of one memory would each be written with all of it."""

    def layer(pipe):
        return next(module for name, module in pipe.transformer.named_modules() if name.endswith(what))

    original = toy.pipeline().to(dtype=dtype)
    expected = size_of(layer(original).state_dict())
    fast = accelerate(original)
    latents(fast)
    for pipe in (fast, original):
        assert size_of(layer(pipe).state_dict()) < 1.1 * expected
        assert size_of(layer(pipe).weight) < 1.1 * size_of(layer(toy.pipeline().to(dtype=dtype)).weight)


@pytest.mark.parametrize("whose", ["ours", "the original's"])
def test_a_state_dict_goes_into_a_safetensors_file(whose, tmp_path):
    """safetensors refuses tensors that share memory: not after a generation either."""
    original = toy.pipeline()
    expected = {name: value.clone() for name, value in original.transformer.state_dict().items()}
    fast = accelerate(original)
    latents(fast)
    model = (fast if whose == "ours" else original).transformer
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    assert size_of(model.state_dict()) < 1.1 * size_of(expected)


def test_moving_and_copying_after_a_generation():
    """A deep copy and a cast have weights of their own, no part of somebody's memory."""
    import copy

    fast = accelerate(toy.pipeline())
    expected = latents(fast)
    twin = copy.deepcopy(fast.transformer)
    with torch.no_grad():
        twin.transformer_blocks[0].attn1.to_q.weight.zero_()
        fast.transformer.transformer_blocks[0].attn1.to_q.weight.mul_(1.0)
    assert_same(latents(fast), expected)
    fast.to(dtype=torch.bfloat16)
    fast.to(dtype=torch.float32)
    assert latents(fast).dtype == torch.float32


def test_an_optimizer_of_the_original_trains_both():
    original = toy.pipeline()
    optimizer = torch.optim.SGD(original.transformer.parameters(), lr=0.1)
    fast = accelerate(original)
    before = latents(fast)
    for parameter in original.transformer.parameters():
        parameter.grad = torch.ones_like(parameter) * 0.1
    optimizer.step()
    assert_differs(latents(original), before)
    assert_same(latents(fast), latents(original))
