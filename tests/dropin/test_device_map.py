"""Device maps: accelerate's dispatch, and a pipeline loaded with one."""

import accelerate as hf_accelerate
import diffusers
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import CogVideoXTransformer3DModel
from torch._subclasses.fake_tensor import FakeTensorMode

from cogvx_fast import EngineConfig, FastCogVideoXPipeline, accelerate
from cogvx_fast.transformer import FastCogVideoXTransformer3DModel, why_not_adopted
from tests import toy

from .generations import CPU, assert_same, frames, latents


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    toy.pipeline().save_pretrained(folder)
    return folder


def load(cls, folder, **kwargs):
    try:
        pipe = cls.from_pretrained(folder, dtype=torch.float32, **kwargs)
    except Exception as error:
        return error
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("device_map", ["balanced", "cpu", "auto", {"": "cpu"}], ids=str)
@pytest.mark.parametrize("max_memory", [None, {"cpu": "10GB"}], ids=str)
def test_a_device_map_of_the_pipeline(device_map, max_memory, folder):
    """As upstream: where that loads, ours does and has the same map; where it raises, ours does."""
    reference, fast = (
        load(cls, folder, device_map=device_map, max_memory=max_memory)
        for cls in (diffusers.CogVideoXPipeline, FastCogVideoXPipeline)
    )
    if isinstance(reference, Exception):
        assert type(fast) is type(reference) and str(fast) == str(reference)
        return
    assert fast.hf_device_map == reference.hf_device_map
    assert_same(frames(fast), frames(reference))


def test_a_device_map_of_the_transformer(folder):
    """A transformer loaded across devices has hooks on its parts, which then are in a pipeline."""
    expected = latents(toy.pipeline())
    model = CogVideoXTransformer3DModel.from_pretrained(
        folder, subfolder="transformer", device_map={"": "cpu"}, dtype=torch.float32
    )
    fast = load(FastCogVideoXPipeline, folder, transformer=model)
    assert_same(latents(fast), expected)


def dispatched(pipe, names):
    """Every model under hooks of accelerate, as `device_map="balanced"` puts them there on a machine with GPUs."""
    for name in names:
        model = getattr(pipe, name)
        hf_accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
        assert hasattr(model, "_hf_hook")
    return pipe


@pytest.mark.parametrize(
    "names", [["transformer"], ["vae"], ["text_encoder"], ["transformer", "vae", "text_encoder"]], ids=str
)
def test_accelerate_after_models_were_dispatched(names):
    """`device_map="balanced"` is nothing that a user could do after: it has to be honoured, or refused in words."""
    expected = frames(toy.pipeline())
    pipe = dispatched(toy.pipeline(), names)
    try:
        fast = accelerate(pipe)
    except ValueError as error:
        assert "device_map" in str(error) or "device map" in str(error)
    else:
        assert_same(frames(fast), expected)
    assert_same(frames(pipe), expected)


def blocks_apart(model):
    """A map of each part of the transformer, its blocks kept whole, one of them in memory that is only visited."""
    devices = {name: "cpu" for name, _ in model.named_children() if name != "transformer_blocks"}
    return devices | {f"transformer_blocks.{i}": "cpu" for i in range(len(model.transformer_blocks))}


def test_dispatching_the_fast_models():
    expected = frames(toy.pipeline())
    fast = dispatched(accelerate(toy.pipeline()), ["transformer", "vae", "text_encoder"])
    assert_same(frames(fast), expected)


def test_dispatching_part_by_part():
    expected = latents(toy.pipeline())
    fast = accelerate(toy.pipeline())
    hf_accelerate.dispatch_model(fast.transformer, blocks_apart(fast.transformer), main_device="cpu", force_hooks=True)
    assert hasattr(fast.transformer.transformer_blocks[1], "_hf_hook")
    assert_same(latents(fast), expected)


def test_what_a_device_map_hooks_is_not_compiled(monkeypatch):
    """accelerate keeps dynamo out of its hooks, so that no block of such modules is one graph."""
    compile_as_written, compiled = torch.compile, []

    def without_inductor(function, **options):
        return compile_as_written(function, backend=lambda graph, _: compiled.append(graph) or graph.forward, **options)

    monkeypatch.setattr(torch, "compile", without_inductor)
    torch.compiler.reset()
    expected, engine = latents(toy.pipeline()), EngineConfig(compile="blocks")
    fast = accelerate(toy.pipeline(), engine)
    assert_same(latents(fast), expected)
    assert compiled
    compiled.clear()
    pipe = toy.pipeline()
    for module in pipe.transformer.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    assert_same(latents(accelerate(pipe, engine)), expected)
    assert not compiled


def test_dispatching_some_parts_to_disk(tmp_path):
    """Weights of a block on the disk are on the meta device until accelerate brings them."""
    expected = latents(toy.pipeline())
    fast = accelerate(toy.pipeline())
    devices = blocks_apart(fast.transformer) | {"transformer_blocks.1": "disk", "patch_embed": "disk"}
    hf_accelerate.dispatch_model(fast.transformer, devices, main_device="cpu", offload_dir=str(tmp_path))
    assert fast.transformer.transformer_blocks[1].norm1.linear.weight.is_meta
    for _ in range(2):
        assert_same(latents(fast), expected)
    assert fast.transformer.transformer_blocks[1].norm1.linear.weight.is_meta


def test_the_modules_that_must_not_be_split_have_classes_that_exist():
    """accelerate looks for these names among the modules when it makes a map: a wrong one splits every block."""
    model = accelerate(toy.pipeline()).transformer
    classes = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) <= classes
    sizes = hf_accelerate.utils.compute_module_sizes(model)
    block = sizes["transformer_blocks.0"]
    budget = {"cpu": sizes[""] - block // 2, "disk": sizes[""]}
    devices = hf_accelerate.infer_auto_device_map(model, budget, no_split_module_classes=model._no_split_modules)
    assert not [name for name in devices if name.startswith("transformer_blocks.") and name.count(".") > 1]


def test_hooks_that_only_align_devices_stay_when_a_model_is_removed_from_them():
    expected = latents(toy.pipeline())
    fast = dispatched(accelerate(toy.pipeline()), ["transformer"])
    assert_same(latents(fast), expected)
    hf_accelerate.hooks.remove_hook_from_module(fast.transformer, recurse=True)
    assert fast.transformer.device == CPU
    assert_same(latents(fast), expected)


def test_a_transformer_that_is_spread_over_devices_runs_as_it_is():
    """Its hooks move what goes from block to block, which our formula would not."""
    model = toy.transformer()
    assert why_not_adopted(model) == ""
    with FakeTensorMode():  # a GPU's memory without one
        model.proj_out.bias = torch.nn.Parameter(torch.empty(model.proj_out.out_features, device="cuda"))
    assert "spread it over cpu, cuda:0, and it runs as it is" in why_not_adopted(model)
    with pytest.raises(ValueError, match="cannot be made fast: a device map has spread it"):
        FastCogVideoXTransformer3DModel.adopt(model)
