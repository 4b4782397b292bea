"""diffusers' caching, casting and offloading on the fast transformer: they take effect, and as they do upstream."""

import accelerate as hf_accelerate
import pytest
import torch
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from torch.utils._python_dispatch import TorchDispatchMode

from cogvx_fast import EngineConfig, accelerate
from cogvx_fast.transformer import EngineSession, FastCogVideoXTransformer3DModel
from tests import toy

from .test_model import forward_inputs, relative

STEPS = 8


def pyramid_attention_broadcast(pipe):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def faster_cache(pipe):
    return FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 1001),
        attention_weight_callback=lambda _: 0.3,
        current_timestep_callback=lambda: pipe.current_timestep,
        tensor_format="BFCHW",
    )


def latents(pipe):
    return pipe(**toy.inputs(num_steps=STEPS, output_type="latent")).frames


@pytest.mark.parametrize("variant", ["2b", "5b"])
@pytest.mark.parametrize("cache", [pyramid_attention_broadcast, faster_cache])
def test_caches_of_attention_give_what_they_give_upstream(cache, variant):
    results = []
    for pipe in (toy.pipeline(variant), accelerate(toy.pipeline(variant))):
        without = latents(pipe)
        pipe.transformer.enable_cache(cache(pipe))
        results.append(latents(pipe))
        assert relative(results[-1], without) > 1e-2
        pipe.transformer.disable_cache()
        assert relative(latents(pipe), without) < 1e-5
    assert relative(results[1], results[0]) < 1e-4


def test_first_block_cache_skips_the_other_blocks():
    # Upstream compares the video's rows from step to step, we the whole stream's: the same where text is little of it.
    pipe = accelerate(toy.pipeline())
    without, calls = latents(pipe), []
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    handle = pipe.transformer.transformer_blocks[1].ff.register_forward_hook(lambda *_: calls.append(1))
    cached = latents(pipe)
    assert len(calls) == 1 and relative(cached, without) > 1e-3
    handle.remove()
    pipe.transformer.disable_cache()
    assert relative(latents(pipe), without) < 1e-5


@pytest.mark.parametrize("variant", ["2b", "5b-i2v"])
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offloading(variant, level):
    expected = latents(toy.pipeline(variant)) if variant == "2b" else None
    model = FastCogVideoXTransformer3DModel.adopt(toy.transformer(variant))
    blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
    cpu = torch.device("cpu")
    arguments = forward_inputs(model)
    with torch.no_grad():
        plain = model(**arguments).sample
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=level, **blocks)
    scheduler = toy.scheduler()
    scheduler.set_timesteps(4)
    current = EngineSession(EngineConfig(), scheduler)
    with torch.no_grad(), model.session(current):
        assert relative(model(**arguments).sample, plain) < 1e-5
    assert all(plan.qkv is None and plan.packed_bytes == 0 for plan in current.block_plans)  # weights come and go
    if expected is not None:
        pipe = accelerate(toy.pipeline(variant))
        pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=level, **blocks)
        assert relative(latents(pipe), expected) < 1e-4


@pytest.mark.parametrize("variant", ["2b", "5b-i2v"])
def test_sequential_offloading_of_every_module(variant):
    """As `enable_sequential_cpu_offload` does on a GPU: weights are on the meta device until their module is called."""
    model = FastCogVideoXTransformer3DModel.adopt(toy.transformer(variant))
    arguments = forward_inputs(model)
    with torch.no_grad():
        expected = model(**arguments).sample
        hf_accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert model.transformer_blocks[0].norm1.norm.weight.device.type == "meta"
        scheduler = toy.scheduler()
        scheduler.set_timesteps(4)
        with model.session(EngineSession(EngineConfig(), scheduler)):
            assert relative(model(**arguments).sample, expected) < 1e-5


def test_layerwise_casting_is_what_it_is_upstream():
    results, storage = [], torch.float8_e4m3fn
    for model in (toy.transformer(), FastCogVideoXTransformer3DModel.adopt(toy.transformer())):
        arguments = forward_inputs(model)
        with torch.no_grad():
            exact = model(**arguments).sample
            model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
            assert model.transformer_blocks[0].attn1.to_q.weight.dtype == storage
            results.append(model(**arguments).sample)
        assert relative(results[-1], exact) > 1e-3
    assert relative(results[1], results[0]) < 1e-5


def test_compiling_leaves_hooked_blocks_to_their_hooks():
    pipe = accelerate(toy.pipeline(), EngineConfig(compile="blocks"))
    pipe.transformer.enable_cache(pyramid_attention_broadcast(pipe))
    reference = toy.pipeline()
    reference.transformer.enable_cache(pyramid_attention_broadcast(reference))
    assert relative(latents(pipe), latents(reference)) < 1e-4


class Synchronizations(TorchDispatchMode):
    """Counts what would make a host wait for its GPU: values of tensors that Python asks for."""

    OPERATIONS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.OPERATIONS:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", toy.VARIANTS)
def test_a_step_asks_for_no_value(variant):
    model = FastCogVideoXTransformer3DModel.adopt(toy.transformer(variant))
    arguments = forward_inputs(model)
    scheduler = toy.scheduler()
    scheduler.set_timesteps(4)
    with torch.no_grad(), model.session(EngineSession(EngineConfig(), scheduler)):
        for step in scheduler.timesteps:
            arguments["timestep"] = step.expand(2)
            with Synchronizations() as counted:
                model(**arguments)
            assert counted.seen == []
    with Synchronizations() as counted:
        torch.ones(1).item()
    assert counted.seen == ["_local_scalar_dense"]
