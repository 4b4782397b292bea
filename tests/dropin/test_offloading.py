"""Offloading: weights are somewhere else until the module that upstream calls for them is called.

On a CPU everything is in the same place always, so what is offloaded is filled with NaN here: whoever reads a weight
that nobody brought gets NaN, as they would get an error on a GPU, or uninitialized memory after a file.
"""

import accelerate as hf_accelerate
import pytest
import torch
from accelerate.hooks import CpuOffload, UserCpuOffloadHook
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup

from cogvx_fast import EngineConfig, accelerate
from tests import toy

from .generations import CPU, assert_same, frames, latents, picture

pytestmark = pytest.mark.slow

PLAIN = (torch.Tensor, torch.nn.Parameter)
LEVELS = {
    "blocks": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "pairs of blocks": {"offload_type": "block_level", "num_blocks_per_group": 2},
    "leaves": {"offload_type": "leaf_level"},
}


class Poison:
    """Keeps what tensors held when they were offloaded; NaN is in its place until they are brought."""

    def __init__(self):
        self.kept = {}
        self.rounds = 0

    def fill(self, tensors):
        for tensor in tensors:
            # Quantized tensors are moved in another way and know no `full_like`.
            if type(tensor) in PLAIN and tensor.is_floating_point() and id(tensor) not in self.kept:
                self.kept[id(tensor)] = (tensor, tensor.data)
                tensor.data = torch.full_like(tensor.data, float("nan"))

    def restore(self, tensors):
        self.rounds += 1
        for tensor in tensors:
            if id(tensor) in self.kept:
                tensor.data = self.kept.pop(id(tensor))[1]


def tensors_of(modules):
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


@pytest.fixture
def group_poison(monkeypatch):
    """Groups of diffusers' offloading whose tensors are NaN while they are not on the device."""
    poison, onload, offload = Poison(), ModuleGroup.onload_, ModuleGroup.offload_

    def members(group):
        return [*tensors_of(group.modules), *group.parameters, *group.buffers]

    def poisoned_onload(group):
        poison.restore(members(group))
        onload(group)

    def poisoned_offload(group):
        offload(group)
        if group.offload_to_disk_path:
            for tensor in members(group):  # fresh memory by now, that of nobody
                if tensor.is_floating_point():
                    tensor.data.fill_(float("nan"))
        else:
            poison.fill(members(group))

    monkeypatch.setattr(ModuleGroup, "onload_", poisoned_onload)
    monkeypatch.setattr(ModuleGroup, "offload_", poisoned_offload)
    return poison


@pytest.fixture
def model_poison(monkeypatch):
    """Models of accelerate's `cpu_offload_with_hook` that are NaN until they are called, and again when offloaded."""
    poison, init, pre_forward = Poison(), CpuOffload.init_hook, CpuOffload.pre_forward

    def poisoned_init(hook, module):
        module = init(hook, module)
        poison.fill(tensors_of([module]))
        return module

    def poisoned_pre_forward(hook, module, *args, **kwargs):
        # Everything is on the CPU here, so accelerate would see no need to send the model before away.
        if isinstance(hook.prev_module_hook, UserCpuOffloadHook):
            poison.fill(tensors_of([hook.prev_module_hook.model]))
        poison.restore(tensors_of([module]))
        return pre_forward(hook, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "init_hook", poisoned_init)
    monkeypatch.setattr(CpuOffload, "pre_forward", poisoned_pre_forward)
    return poison


def is_away(module):
    return all(bool(p.isnan().all()) for p in module.parameters())


def inputs_of(variant):
    return {"image": picture()} if "i2v" in variant else {}


def group_options(level, tmp_path=None):
    disk = {} if tmp_path is None else {"offload_to_disk_path": str(tmp_path)}
    return {"onload_device": CPU, "offload_device": CPU, **LEVELS[level], **disk}


@pytest.mark.parametrize(
    ("variant", "level", "place"),
    [
        *((variant, level, "memory") for variant in ("2b", "5b-i2v", "1.5-5b-i2v") for level in LEVELS),
        *((variant, level, "disk") for variant in ("2b", "5b-i2v") for level in ("blocks", "leaves")),
    ],
)
def test_group_offloading_of_the_transformer(variant, level, place, group_poison, tmp_path):
    expected = latents(toy.pipeline(variant), **inputs_of(variant))
    fast = accelerate(toy.pipeline(variant))
    fast.transformer.enable_group_offload(**group_options(level, tmp_path if place == "disk" else None))
    assert is_away(fast.transformer.transformer_blocks[1]) and is_away(fast.transformer.time_embedding)
    for _ in range(2):  # what a first generation left would show in the second
        assert_same(latents(fast, **inputs_of(variant)), expected)
        assert is_away(fast.transformer.transformer_blocks[1]) and is_away(fast.transformer.norm_out)
    assert group_poison.rounds > 0


@pytest.mark.parametrize("level", LEVELS)
def test_group_offloading_of_a_size_with_other_positions(level, group_poison):
    other = {"height": 48, "width": 16, "num_frames": 17}
    expected = latents(toy.pipeline(), **other)
    fast = accelerate(toy.pipeline())
    apply_group_offloading(fast.transformer, **group_options(level))
    assert_same(latents(fast, **other), expected)


@pytest.mark.parametrize("level", ["blocks", "leaves"])
def test_group_offloading_outside_a_pipeline(level, group_poison):
    from .generations import transformer_inputs

    reference, fast = toy.transformer(), accelerate(toy.pipeline()).transformer
    fast.enable_group_offload(**group_options(level))
    with torch.no_grad():
        expected = reference(**transformer_inputs(reference)).sample
        assert_same(fast(**transformer_inputs(fast)).sample, expected)


@pytest.mark.parametrize("level", ["blocks", "leaves"])
def test_group_offloading_of_a_whole_pipeline(level, group_poison):
    expected = frames(toy.pipeline())
    fast = accelerate(toy.pipeline())
    # Upstream, whole blocks of this autoencoder are never brought: `decode` is not the `forward` that would.
    fast.enable_group_offload(**group_options(level), exclude_modules=["vae"] if level == "blocks" else None)
    assert is_away(fast.vae.decoder.conv_in if level == "leaves" else fast.text_encoder.encoder.block[0])
    assert_same(frames(fast), expected)


SWITCHES = {
    "no table": {"modulation_table": False},
    "text each step": {"reuse_text_projection": False},
    "torch": {"fuse_operations": False, "fuse_projections": False},
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_group_offloading_with_parts_of_the_engine_off(switch, group_poison):
    expected = latents(toy.pipeline())
    fast = accelerate(toy.pipeline(), EngineConfig(**SWITCHES[switch]))
    fast.transformer.enable_group_offload(**group_options("blocks"))
    assert_same(latents(fast), expected)


def test_group_offloading_of_the_autoencoder(group_poison):
    reference, fast = toy.pipeline(), accelerate(toy.pipeline())
    sample = torch.randn(1, 3, 9, toy.SIZE, toy.SIZE, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    with torch.no_grad():
        moments = reference.vae.encode(sample).latent_dist.mode()
        pixels = reference.vae.decode(moments).sample
        fast.vae.enable_group_offload(**group_options("leaves"))
        assert_same(fast.vae.encode(sample).latent_dist.mode(), moments)
        assert_same(fast.vae.decode(moments).sample, pixels)
        assert_same(fast.vae(sample).sample, reference.vae(sample).sample)
    assert group_poison.rounds > 0


def test_what_group_offloading_never_brings_is_not_decoded_in_silence(group_poison):
    """Upstream's block level brings the autoencoder's parts for `forward` only: `decode` must not return that."""
    fast = accelerate(toy.pipeline())
    z = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = toy.vae().decode(z).sample
    fast.vae.enable_group_offload(**group_options("blocks"))
    with torch.no_grad():
        try:
            pixels = fast.vae.decode(z).sample
        except ValueError as error:
            assert "offload" in str(error)
        else:
            assert_same(pixels, expected)


@pytest.mark.parametrize("level", ["blocks", "leaves"])
def test_group_offloading_with_an_adapter(level, group_poison):
    from peft import LoraConfig

    targets = ["norm1.linear", "to_q", "text_proj", "linear_1", "ff.net.2"]
    results = []
    for pipe in (toy.pipeline(), accelerate(toy.pipeline())):
        torch.manual_seed(0)
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        pipe.transformer.enable_group_offload(**group_options(level))
        results.append(latents(pipe))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("level", ["blocks", "leaves"])
def test_offloading_before_accelerate_is_honoured_or_refused(level, group_poison):
    expected = latents(toy.pipeline())
    pipe = toy.pipeline()
    pipe.transformer.enable_group_offload(**group_options(level))
    try:
        fast = accelerate(pipe)
    except ValueError as error:
        assert "offload" in str(error) and "fast first" in str(error)
        assert_same(latents(pipe), expected)  # and it goes on working
        return
    assert_same(latents(fast), expected)
    assert is_away(fast.transformer.transformer_blocks[1])
    assert_same(latents(pipe), expected)


def test_model_offloading(model_poison):
    expected = frames(toy.pipeline())
    fast = accelerate(toy.pipeline())
    fast.enable_model_cpu_offload(device="cpu")
    assert all(map(is_away, (fast.transformer, fast.vae, fast.text_encoder)))
    for _ in range(2):
        assert_same(frames(fast), expected)
    assert is_away(fast.transformer) and model_poison.rounds > 0


def test_model_offloading_streams_and_encodes(model_poison):
    """Who calls the autoencoder by other doors than `forward` has its weights brought too."""
    reference = toy.pipeline("5b-i2v")
    expected = latents(reference, image=picture())
    fast = accelerate(toy.pipeline("5b-i2v"))
    fast.enable_model_cpu_offload(device="cpu")
    output = latents(fast, image=picture())
    assert_same(output, expected)
    streamed = torch.cat(list(fast.decode_stream(output)), dim=2)
    with torch.no_grad():
        assert_same(streamed, reference.decode_latents(expected))


@pytest.mark.parametrize("variant", ["2b", "5b-i2v", "1.5-5b-i2v"])
def test_sequential_offloading_of_every_model(variant):
    """accelerate's hooks put weights on the meta device until their own module is called."""
    expected = frames(toy.pipeline(variant), **inputs_of(variant))
    fast = accelerate(toy.pipeline(variant))
    for model in (fast.text_encoder, fast.transformer, fast.vae):
        hf_accelerate.cpu_offload(model, CPU, offload_buffers=bool(model._parameters))
    assert fast.transformer.patch_embed.text_proj.weight.is_meta and fast.vae.decoder.conv_in.conv.weight.is_meta
    for _ in range(2):
        assert_same(frames(fast, **inputs_of(variant)), expected)
    assert fast.transformer.patch_embed.text_proj.weight.is_meta


def test_sequential_offloading_of_buffers_too():
    expected = latents(toy.pipeline("5b-i2v"), image=picture())
    fast = accelerate(toy.pipeline("5b-i2v"))
    hf_accelerate.cpu_offload(fast.transformer, CPU, offload_buffers=True)
    assert fast.transformer.patch_embed.pos_embedding.is_meta
    assert_same(latents(fast, image=picture()), expected)


def test_offloading_to_disk_by_accelerate(tmp_path):
    expected = latents(toy.pipeline())
    fast = accelerate(toy.pipeline())
    hf_accelerate.disk_offload(fast.transformer, str(tmp_path), execution_device=CPU)
    assert fast.transformer.transformer_blocks[0].ff.net[2].weight.is_meta
    assert_same(latents(fast), expected)


@pytest.mark.parametrize("recipe", ["int8", "int8-weight"])
def test_offloading_of_quantized_weights(recipe, group_poison):
    """torchao's tensors are moved another way; those that are not quantized are poisoned as everywhere."""
    fast = accelerate(toy.pipeline(), EngineConfig(recipe=recipe))
    expected = latents(fast)
    fast.transformer.enable_group_offload(**group_options("blocks"))
    assert_same(latents(fast), expected, limit=5e-2)
