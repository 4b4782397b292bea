"""diffusers' caching, casting and offloading on the fast transformer: they take effect, and as they do upstream."""

import accelerate as hf_accelerate
import pytest
import torch
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from torch.utils._python_dispatch import TorchDispatchMode

from cogvx_fast import EngineConfig, accelerate
from cogvx_fast.transformer import FastCogVideoXTransformer3DModel
from tests import toy
from tests.generation import bound, fast_model, forward_inputs, plain, relative, run, session

pytestmark = pytest.mark.slow

STEPS = 8
THRESHOLD = 1.0  # of first-block cache: some steps are skipped and some are not


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


@pytest.mark.parametrize("variant", ["2b", "5b"])
def test_first_block_cache_gives_what_it_gives_upstream(variant):
    results, skipped = [], []
    for pipe in (toy.pipeline(variant), accelerate(toy.pipeline(variant))):
        without, calls = latents(pipe), []
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=THRESHOLD))
        handle = pipe.transformer.transformer_blocks[1].ff.register_forward_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        results.append(latents(pipe))
        skipped.append(STEPS - len(calls))
        assert relative(results[-1], without) > 1e-3
        handle.remove()
        pipe.transformer.disable_cache()
        assert relative(latents(pipe), without) < 1e-5
    # It compares the video's rows from step to step: the same decisions, and so the same result.
    assert 0 < skipped[0] < STEPS - 1 and skipped[1] == skipped[0]
    assert relative(results[1], results[0]) < 1e-4


def spy_on(module, kinds):
    """What `module` is called with, by position and by name, and gives: for each call, the names and shapes."""
    seen = []

    def shapes(values):
        return {name: tuple(value.shape) for name, value in values if isinstance(value, torch.Tensor)}

    def hook(_, args, kwargs, output):
        output = output if isinstance(output, tuple) else (output,)
        seen.append((shapes(enumerate(args)), sorted(kwargs), shapes(kwargs.items()), [o.shape for o in output]))

    kinds.append(module.register_forward_hook(hook, with_kwargs=True))
    return seen


@pytest.mark.parametrize("path", ["", "norm1", "norm2.norm", "attn1", "attn1.to_k", "attn1.norm_q", "ff", "ff.net.2"])
def test_what_is_hooked_is_called_as_diffusers_calls_it(path):
    calls, outputs, handles = [], [], []
    reference = toy.transformer("5b")
    model = FastCogVideoXTransformer3DModel.adopt(toy.transformer("5b"))
    current = session(model)
    for each, step in ((reference, plain), (model, run)):
        calls.append(spy_on(each.transformer_blocks[1].get_submodule(path), handles))
        outputs.append(step(each, current))
    assert len(calls[0]) > 0 and current.ran.fast == 1
    joint = path in ("attn1.to_k", "attn1.norm_q", "ff", "ff.net.2")  # of the joint stream here and there
    assert calls[1] == calls[0] if not joint else len(calls[1]) == len(calls[0])
    assert relative(outputs[1], outputs[0]) < 1e-5
    others = [block.called for block in current.ran.blocks]
    assert others == [False, path in ("", "norm1", "norm2.norm"), False]


@pytest.mark.parametrize("path", ["", "norm1", "attn1", "attn1.to_v", "ff", "ff.net.0"])
def test_what_a_hook_changes_is_changed(path):
    outputs, current = [], None
    for model in (toy.transformer("5b"), fast_model("5b")):
        current = current or session(fast_model("5b"))
        module = model.transformer_blocks[0].get_submodule(path)
        module.register_forward_hook(lambda _, args, output: doubled(output))
        generation = session(model) if isinstance(model, FastCogVideoXTransformer3DModel) else None
        outputs.append(plain(model, current) if generation is None else run(model, generation))
    assert relative(outputs[1], outputs[0]) < 1e-5
    assert relative(outputs[0], plain(toy.transformer("5b"), current)) > 1e-3


PARTS = ["patch_embed", "patch_embed.text_proj", "patch_embed.proj", "time_proj", "time_embedding.linear_1"]
PARTS += ["embedding_dropout", "norm_final", "norm_out", "norm_out.linear", "norm_out.norm", "proj_out"]


@pytest.mark.parametrize("variant", ["2b", "1.5-5b-i2v"])
@pytest.mark.parametrize("path", PARTS)
def test_parts_beside_the_blocks_are_called_as_diffusers_calls_them(path, variant):
    calls, outputs = [], []
    reference, model = toy.transformer(variant), fast_model(variant)
    current = session(model)
    for each, step in ((reference, plain), (model, run)):
        calls.append(spy_on(each.get_submodule(path), []))
        outputs.append(step(each, current))
    assert calls[1] == calls[0] and calls[0] and current.ran.fast == 1
    assert relative(outputs[1], outputs[0]) < 1e-5


def doubled(output):
    return 2 * output if isinstance(output, torch.Tensor) else (2 * output[0], *output[1:])


def test_a_hook_that_comes_in_the_middle_of_a_generation_runs():
    model, called = fast_model(), []
    with (current := session(model)).active():
        before = run(model, current)
        handle = model.transformer_blocks[1].register_forward_hook(lambda *_: called.append(1))
        assert relative(run(model, current), before) < 1e-5 and called == [1]
        handle.remove()
        assert torch.equal(run(model, current), before) and called == [1]


def test_a_block_can_be_called_by_itself_as_diffusers_calls_it():
    reference = toy.transformer("5b")
    model = FastCogVideoXTransformer3DModel.adopt(reference)
    arguments = {
        "hidden_states": torch.randn(2, 12, 64),
        "encoder_hidden_states": torch.randn(2, 16, 64),
        "temb": torch.randn(2, 24),
        "image_rotary_emb": forward_inputs(model)["image_rotary_emb"],
    }
    with torch.no_grad():
        expected = reference.transformer_blocks[0](**arguments)
        for output, wanted in zip(model.transformer_blocks[0](**arguments), expected, strict=True):
            assert torch.equal(output, wanted)
        with (current := session(model)).active():
            run(model, current)
            for output, wanted in zip(model.transformer_blocks[0](**arguments), expected, strict=True):
                assert output.shape == wanted.shape and relative(output, wanted) < 1e-5


@pytest.mark.parametrize("variant", ["2b", "5b-i2v"])
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offloading(variant, level):
    model = fast_model(variant)
    current, blocks = session(model), {"num_blocks_per_group": 1} if level == "block_level" else {}
    expected, cpu = plain(model, current), torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=level, **blocks)
    with current.active():
        assert relative(run(model, current), expected) < 1e-5
        assert all(how.qkv is None and how.ff is None for how in bound(model, current))  # weights come and go
    if variant == "2b":
        expected, pipe = latents(toy.pipeline(variant)), accelerate(toy.pipeline(variant))
        pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=level, **blocks)
        assert relative(latents(pipe), expected) < 1e-4


@pytest.mark.parametrize("variant", ["2b", "5b-i2v"])
def test_sequential_offloading_of_every_module(variant):
    """As `enable_sequential_cpu_offload` does on a GPU: weights are on the meta device until their module is called."""
    model = fast_model(variant)
    current = session(model)
    expected = plain(model, current)
    hf_accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.transformer_blocks[0].norm1.norm.weight.device.type == "meta"
    assert relative(run(model, current), expected) < 1e-5 and current.ran.fast == 1


def test_layerwise_casting_is_what_it_is_upstream():
    results, storage = [], torch.float8_e4m3fn
    for model, step in ((toy.transformer(), plain), (fast_model(), run)):
        current = session(fast_model() if step is plain else model)
        exact = step(model, current)
        model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
        assert model.transformer_blocks[0].attn1.to_q.weight.dtype == storage
        results.append(step(model, current))
        assert relative(results[-1], exact) > 1e-3
    assert relative(results[1], results[0]) < 1e-5


@pytest.mark.parametrize("compiles", ["blocks", "full"])
def test_compiling_calls_hooked_blocks_as_they_are(compiles):
    torch._dynamo.reset()
    model, seen = fast_model(), []
    model.transformer_blocks[1].register_forward_hook(lambda *_: seen.append(torch.compiler.is_compiling()))
    current = session(model, compile=compiles)
    assert relative(run(model, current), plain(model, current)) < 1e-5 and current.ran.fast == 1
    torch._dynamo.reset()
    assert seen == [False, False]  # in the step and in diffusers' own


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", toy.VARIANTS)
def test_a_step_asks_for_no_value(variant, dtype):
    model = fast_model(variant).to(dtype)
    # Where a callback might write to them, numbers of weights on a CPU are looked at: see `state`.
    with (current := session(model, 4, watched=False)).active():
        for step in range(4):
            with Synchronizations() as counted:
                run(model, current, step, dtype=dtype)
            assert counted.seen == []
    assert current.ran.fast == 4
    with Synchronizations() as counted:
        torch.ones(1).item()
    assert counted.seen == ["_local_scalar_dense"]
