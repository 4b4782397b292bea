"""What only a GPU can show: that the Triton kernels run there, are right, and are what ran. Skipped without one."""

from pathlib import Path

import pytest
import torch
from cogvx_kernels._triton import why_unavailable

from cogvx_fast import EngineConfig, accelerate
from tests import test_demo
from tests.kernels.operations import CASES, EVERY, Size

REASON = why_unavailable() or (None if torch.cuda.is_available() else "torch finds no CUDA GPU")
if why_unavailable() is None:
    from cogvx_kernels._triton.tuned import TunedKernel
    from cogvx_kernels.aot import farm, models, prebuilt
    from cogvx_kernels.targets import target_of, why_not_e4m3
    from triton import knobs

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

SIZES = [Size(2, 1300, 30, 226), Size(3, 33, 2, 0)]  # of 2b, and of no member: each is compiled anew
OF_A_BLOCK = {
    "layer_norm_modulate_kernel",
    "qk_norm_rope_kernel",
    "attention_kernel",
    "gated_residual_layer_norm_modulate_kernel",
    "gated_residual_kernel",
}
OF_A_BLOCK_IN_INT8 = OF_A_BLOCK - {"qk_norm_rope_kernel", "attention_kernel"} | {
    "scaled_linear_kernel",
    "quantize_rows_kernel",
    "qk_norm_rope_int8_kernel",
    "int8_attention_kernel",
}


@pytest.fixture
def launched():
    """The names of the Triton kernels that are launched, in order, as triton itself reports each launch."""
    names = []

    def note(metadata):
        names.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(note)
    yield names
    knobs.runtime.launch_enter_hook.remove(note)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("name", "dtype"), EVERY, ids=str)
def test_operation(name, dtype, size, launched, monkeypatch):
    case, device = CASES[name], torch.device("cuda")
    if case.needs_e4m3 and why_not_e4m3(device) is not None:
        pytest.skip(why_not_e4m3(device))
    arguments = on(device, case.make(size, dtype))
    case.call(*arguments, impl="torch")
    assert launched == []
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: _poisoned(empty_like(*a, **k)))
    case.assert_right(arguments)
    assert set(launched) == set(case.kernels)  # more than once where configurations were timed
    launched.clear()
    case.call(*arguments, impl="triton")
    assert launched == list(case.kernels)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
@pytest.mark.parametrize("name", ["layer_norm_modulate", "attention"])
def test_an_operation_on_a_second_gpu(name, launched):
    """Triton launches on the current device, which is the first."""
    case, second = CASES[name], torch.device("cuda", 1)
    arguments = on(second, case.make(SIZES[1], torch.float16))
    case.assert_right(arguments)
    assert torch.cuda.current_device() == 0 and set(launched) == set(case.kernels)


def on(device, values):
    def moved(value):
        return on(device, value) if isinstance(value, tuple) else value.to(device) if torch.is_tensor(value) else value

    return tuple(map(moved, values))


def _poisoned(fresh):
    """What an operation forgets to write is seen."""
    return fresh.fill_(float("nan")) if fresh.is_floating_point() and fresh.itemsize > 1 else fresh


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


def test_the_demo_in_int8_shows_what_the_prompt_says(launched):
    engine = EngineConfig(recipe="int8", attention="triton-int8")
    fast = accelerate(test_demo.load(torch.float16).to("cuda"), engine=engine)
    clips = test_demo.generate(fast, output_type="pt").cpu()
    for clip, scene in zip(clips, test_demo.SCENES, strict=True):
        test_demo.assert_shows(clip, scene)
    assert set(launched) >= OF_A_BLOCK_IN_INT8, fast.engine_report()
    assert not set(launched) & {"qk_norm_rope_kernel", "attention_kernel"}


def test_nothing_is_compiled_that_was_built_ahead(noise, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    vae = models.Autoencoder((16, 32, 48, 64), groups=1)
    model = models.Model(4, 64, "float16", rotary=False, tokens=80, vae=vae)  # the demo
    jobs = farm.jobs(model, [target_of(torch.device("cuda")).name])
    built = [entry for _, entry in farm.run(jobs, prebuilt.entry, 1)]
    for kernel in TunedKernel.all():  # what this process compiled before would not be looked up
        kernel.fn.device_caches.clear()
        monkeypatch.setattr(kernel, "_chosen", {})
    looked_up = {}

    def listen(src, metadata, metadata_group, times, cache_hit):
        looked_up[Path(next(iter(metadata_group.values()))).parent.name] = cache_hit

    monkeypatch.setattr(knobs.compilation, "listener", listen)
    # Through inductor kernels are looked up by keys of its own.
    fast = accelerate(test_demo.load(torch.float16), engine=EngineConfig(attention="triton", compile="off"))
    generate(fast, noise, torch.float16)
    assert looked_up and all(looked_up.values()) and set(looked_up) <= {entry.folder for entry in built}
