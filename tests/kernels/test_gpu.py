"""What only a GPU can show: that the Triton kernels run there, are right, and are what ran. Skipped without one."""

from pathlib import Path

import pytest
import torch
from cogvx_kernels import ops
from cogvx_kernels.triton import why_not

from cogvx_fast import EngineConfig, accelerate
from tests import test_demo
from tests.kernels.budget import assert_within_budget

REASON = why_not() or (None if torch.cuda.is_available() else "torch finds no CUDA GPU")
if why_not() is None:
    from cogvx_kernels import aot, farm, prebuilt
    from cogvx_kernels.triton.targets import TunedKernel, target_of
    from triton import knobs

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

HALF = (torch.float16, torch.bfloat16)
SHAPES = [(2, 1300, 30, 226), (1, 227, 48, 226), (3, 33, 2, 0)]  # batch, sequence, heads, text: 2b, 5b, neither
OF_A_BLOCK = {
    "layer_norm_modulate_kernel",
    "qk_norm_rope_kernel",
    "attention_kernel",
    "gated_residual_layer_norm_modulate_kernel",
    "gated_residual_kernel",
}


def randn(*shape, dtype, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def stream(batch, sequence, heads, text, dtype):
    """By position: x, y, and by name the vectors, as they lie in the modulation table."""
    dim = heads * 64
    x, y = randn(batch, sequence, dim, dtype=dtype, seed=0) * 3 + 1, randn(batch, sequence, dim, dtype=dtype, seed=1)
    shift, scale, gate = randn(1, 2, 3, dim, dtype=dtype, seed=2).unbind(2)
    affine = randn(dim, dtype=dtype, seed=3), randn(dim, dtype=dtype, seed=4)
    return x, y, affine, shift, scale, gate


def layer_norm_modulate(batch, sequence, heads, text, dtype):
    x, _, affine, shift, scale, _ = stream(batch, sequence, heads, text, dtype)
    return x, *affine, shift, scale, text


def gated_residual(batch, sequence, heads, text, dtype):
    x, y, _, _, _, gate = stream(batch, sequence, heads, text, dtype)
    return x, y, gate, text


def gated_residual_layer_norm_modulate(batch, sequence, heads, text, dtype):
    x, y, affine, shift, scale, gate = stream(batch, sequence, heads, text, dtype)
    return x, y, gate, *affine, shift, scale, text


def rotary(sequence, text):
    angles = randn(sequence - text, 64, dtype=torch.float32, seed=5)
    return angles.cos(), angles.sin()


def qk_norm_rope(batch, sequence, heads, text, dtype):
    query, key, _ = randn(batch, sequence, 3, heads, 64, dtype=dtype, seed=0).unbind(2)
    affine = [randn(64, dtype=dtype, seed=seed) for seed in (1, 2, 3, 4)]
    return query, key, *affine, rotary(sequence, text), text


def norm_rope(batch, sequence, heads, text, dtype):
    query, _, weight, bias, *_ = qk_norm_rope(batch, sequence, heads, text, dtype)
    return query, weight, bias, rotary(sequence, text), text


def attention(batch, sequence, heads, text, dtype):
    return randn(batch, sequence, 3, heads, 64, dtype=dtype, seed=0).unbind(2)


# What each operation is called with, the dtypes it takes and the kernels it launches.
OPERATIONS = {
    "layer_norm_modulate": (layer_norm_modulate, (*HALF, torch.float32), ["layer_norm_modulate_kernel"]),
    "gated_residual": (gated_residual, (*HALF, torch.float32), ["gated_residual_kernel"]),
    "gated_residual_layer_norm_modulate": (
        gated_residual_layer_norm_modulate,
        (*HALF, torch.float32),
        ["gated_residual_layer_norm_modulate_kernel"],
    ),
    "norm_rope": (norm_rope, (*HALF, torch.float32), ["qk_norm_rope_kernel"]),
    "qk_norm_rope": (qk_norm_rope, (*HALF, torch.float32), ["qk_norm_rope_kernel"]),
    "attention": (attention, HALF, ["attention_kernel"]),
}
CASES = [(name, dtype) for name, (_, dtypes, _) in OPERATIONS.items() for dtype in dtypes]


@pytest.fixture
def launched():
    """The names of the Triton kernels that are launched, in order, as triton itself reports each launch."""
    names = []

    def note(metadata):
        names.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(note)
    yield names
    knobs.runtime.launch_enter_hook.remove(note)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("operation", "dtype"), CASES, ids=str)
def test_operation(operation, dtype, shape, launched, monkeypatch):
    make, _, kernels = OPERATIONS[operation]
    arguments = make(*shape, dtype)
    call = getattr(ops, operation)
    call(*arguments, impl="torch")
    assert launched == []
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: _poisoned(empty_like(*a, **k)))
    assert_within_budget(call, arguments, "triton")
    assert set(launched) == set(kernels)  # more than once where configurations were timed
    launched.clear()
    call(*arguments, impl="triton")
    assert launched == kernels


def _poisoned(fresh):
    """What an operation forgets to write is seen."""
    return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh


@pytest.fixture
def noise():
    """Latents of the demo's size, representable in fp16."""
    shape = len(test_demo.PROMPTS), 5, 16, 8, 8
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).half().float()


def generate(pipe, noise, dtype):
    return test_demo.generate(pipe.to("cuda"), latents=noise.to("cuda", dtype)).cpu()


def test_the_demo_as_exact_as_diffusers(launched, noise):
    expected = generate(test_demo.load(torch.float32), noise, torch.float32)
    pipe = test_demo.load(torch.float16)
    own = test_demo.relative(generate(pipe, noise, torch.float16), expected)
    assert launched == []
    fast = accelerate(pipe, engine=EngineConfig(attention="triton"))
    ours = test_demo.relative(generate(fast, noise, torch.float16), expected)
    assert set(launched) >= OF_A_BLOCK, fast.engine_report()
    assert 0 < sum(ours) / len(ours) <= 1.1 * sum(own) / len(own), (ours, own)


def test_the_demo_shows_what_the_prompt_says(launched):
    fast = accelerate(test_demo.load(torch.float16).to("cuda"), engine=EngineConfig(attention="triton"))
    clips = test_demo.generate(fast, output_type="pt").cpu()
    for clip, scene in zip(clips, test_demo.SCENES, strict=True):
        test_demo.assert_shows(clip, scene)
    assert set(launched) >= OF_A_BLOCK


def test_nothing_is_compiled_that_was_built_ahead(noise, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    model = aot.Model(4, 64, "float16", rotary=False, tokens=80)  # the demo
    built = [entry for _, entry in farm.run(farm.jobs(model, [target_of(torch.device("cuda"))]), prebuilt.entry, 1)]
    for kernel in TunedKernel.all():  # what this process compiled before would not be looked up
        kernel.fn.device_caches.clear()
        kernel._tuners.clear()
    looked_up = {}

    def listen(src, metadata, metadata_group, times, cache_hit):
        looked_up[Path(next(iter(metadata_group.values()))).parent.name] = cache_hit

    monkeypatch.setattr(knobs.compilation, "listener", listen)
    fast = accelerate(test_demo.load(torch.float16), engine=EngineConfig(attention="triton"))
    generate(fast, noise, torch.float16)
    assert looked_up and all(looked_up.values()) and set(looked_up) <= {entry.folder for entry in built}
