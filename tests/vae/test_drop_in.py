"""Whatever diffusers' autoencoder can be done to can be done to ours, with the same numbers."""

import concurrent.futures
import copy
import json
import subprocess
import sys

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, CpuOffload, SequentialHook, add_hook_to_module
from diffusers import AutoencoderKLCogVideoX
from torch import nn

from cogvx_fast import session
from cogvx_fast.plan import UNLIMITED, VaePlan
from cogvx_fast.vae import FastAutoencoderKLCogVideoX, choose_vae, model

from .conftest import distance, family, randn

pytestmark = pytest.mark.slow

LATENTS, PIXELS = randn(1, 16, 5, 2, 3), randn(1, 3, 9, 16, 24)


@pytest.fixture(autouse=True)
def _without_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def ours(monkeypatch):
    """How many chunks our layers have computed."""
    chunks = []
    for name in ("decode_chunk", "encode_chunk"):
        run = getattr(model, name)
        monkeypatch.setattr(model, name, lambda *a, run=run: chunks.append(1) or run(*a))
    return chunks


def results(vae, latents=LATENTS, pixels=PIXELS):
    return vae.decode(latents).sample, vae.encode(pixels).latent_dist.parameters


def are_equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def are_close(first, second):
    return all(distance(a, b) < 1e-5 for a, b in zip(first, second, strict=True))


def loaded(reference, folder):
    reference.save_pretrained(folder / "vae")
    return FastAutoencoderKLCogVideoX.from_pretrained(folder, subfolder="vae")


def from_config(reference, _):
    return FastAutoencoderKLCogVideoX.from_config(reference.config)


def constructed(reference, _):
    return FastAutoencoderKLCogVideoX(**{k: v for k, v in reference.config.items() if not k.startswith("_")})


@pytest.mark.parametrize("make", [loaded, from_config, constructed])
def test_made_as_diffusers_class_is(make, tmp_path, ours):
    reference = family()
    fast = make(reference, tmp_path)
    assert type(fast) is FastAutoencoderKLCogVideoX
    fast.load_state_dict(reference.state_dict())
    fast.eval()
    assert are_close(results(fast), results(reference)) and ours
    fast.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["_class_name"] == "AutoencoderKLCogVideoX"
    assert are_equal(results(AutoencoderKLCogVideoX.from_pretrained(tmp_path / "again")), results(reference))


def test_an_activation_that_our_layers_have_not_is_diffusers_own(ours):
    fast = FastAutoencoderKLCogVideoX.from_config(family(act_fn="gelu").config)
    assert are_equal(results(fast), results(fast.as_reference())) and not ours


def test_copies_and_pickles(fresh, tmp_path):
    fast = fresh[1]
    expected = results(fast)
    torch.save(fast, tmp_path / "vae.pt")
    for other in (copy.deepcopy(fast), torch.load(tmp_path / "vae.pt", weights_only=False)):
        assert are_equal(results(other), expected)
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(other.parameters(), fast.parameters(), strict=True))


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_autocast_is_diffusers_own(fresh, ours, cast):
    reference, fast = fresh
    plain = results(reference)
    with torch.autocast("cpu", cast):
        expected = results(reference)
        assert are_equal(results(fast), expected) and not are_close(expected, plain)
        (whole,) = fast.decode_stream(LATENTS)
    assert torch.equal(whole, expected[0]) and not ours
    stream = fast.decode_stream(LATENTS)
    with torch.autocast("cpu", cast):  # it was asked for outside
        assert distance(torch.cat(list(stream), dim=2), plain[0]) < 1e-5


def test_autocast_takes_frames_of_another_dtype_as_diffusers_does():
    reference = family().to(torch.bfloat16)
    fast = FastAutoencoderKLCogVideoX.adopt(reference)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast.encode(PIXELS).latent_dist.mean, reference.encode(PIXELS).latent_dist.mean)


def test_a_compiled_call_is_diffusers_own(ours):
    reference = family(layers_per_block=1)
    fast = FastAutoencoderKLCogVideoX.adopt(reference)
    encode = torch.compile(fast.encode, fullgraph=True, backend="eager")
    output, expected = (call(PIXELS, return_dict=False)[0] for call in (encode, reference.encode))
    assert torch.equal(output.parameters, expected.parameters) and not ours
    fast.decode = torch.compile(fast.decode, fullgraph=True, backend="eager")
    assert torch.equal(fast.decode(LATENTS).sample, reference.decode(LATENTS).sample) and not ours
    (whole,) = torch.compile(lambda: list(fast.decode_stream(LATENTS)), fullgraph=True, backend="eager")()
    assert torch.equal(whole, reference.decode(LATENTS).sample) and not ours
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    assert torch.equal(compiled(PIXELS).sample, reference(PIXELS).sample) and not ours
    assert distance(compiled.encode(PIXELS).latent_dist.mean, reference.encode(PIXELS).latent_dist.mean) < 1e-5
    assert ours  # only the call of the whole is compiled


def test_a_compiled_autoencoder_is_adopted_and_stays_compiled(ours):
    reference = family(layers_per_block=1)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    fast = FastAutoencoderKLCogVideoX.adopt(torch.compile(reference, fullgraph=True, backend=backend))
    assert type(fast._orig_mod) is FastAutoencoderKLCogVideoX
    assert torch.equal(fast(PIXELS).sample, reference(PIXELS).sample) and graphs and not ours
    assert are_close(results(fast), results(reference)) and ours
    assert choose_vae(torch.device("cpu"), torch.float32, True, None, torch.compile(reference)).ours


def test_one_that_was_compiled_in_place_is_refused():
    reference = family(layers_per_block=1)
    reference.compile(backend="eager")
    with pytest.raises(ValueError, match=r"compiled in place; .* then call vae.compile\(\)"):
        FastAutoencoderKLCogVideoX.adopt(reference)
    fast = FastAutoencoderKLCogVideoX.adopt(family(layers_per_block=1))
    fast.compile(fullgraph=True, backend="eager")
    assert torch.equal(fast(PIXELS).sample, family(layers_per_block=1)(PIXELS).sample)


PLACES = ["", "decoder", "encoder", "decoder.up_blocks.0.resnets.1.conv1.conv", "encoder.down_blocks.0.resnets.0.norm1"]


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("place", PLACES)
def test_hooks_do_what_they_do_in_diffusers(place, before):
    """A hook on the whole acts on its own call, not on `decode` and `encode`; any other on these, too."""

    def clamp(module, arguments, output=None):
        value = arguments[0] if output is None else output
        if isinstance(value, tuple):
            return (value[0].clamp(min=0), *value[1:])
        return type(value)(sample=value.sample.clamp(min=0)) if hasattr(value, "sample") else value.clamp(min=0)

    def plant(vae):
        module = vae.get_submodule(place)
        handles.append(module.register_forward_hook(clamp))
        handles.append(module.register_forward_pre_hook(clamp))

    reference, handles = family(), []
    plain = (*results(reference), reference(PIXELS).sample)
    if before:
        plant(reference)
    fast = FastAutoencoderKLCogVideoX.adopt(reference)
    if not before:
        plant(fast)
    expected = results(fast.as_reference())
    assert are_close(results(fast), expected)
    assert are_close(expected, plain[:2]) == (place == "")
    whole = fast.as_reference()(PIXELS).sample
    assert distance(fast(PIXELS).sample, whole) < 1e-5 and distance(whole, plain[2]) > 1e-2
    for handle in handles:
        handle.remove()
    assert are_close((*results(fast), fast(PIXELS).sample), plain)


def test_layers_of_another_class_are_called(fresh, ours):
    reference, fast = fresh
    adapted = fast.decoder.up_blocks[1].resnets[0].conv1

    class Adapted(nn.Conv3d):
        def forward(self, x):
            return super().forward(x).relu()

    conv = Adapted(adapted.conv.in_channels, adapted.conv.out_channels, 3, padding=adapted.conv.padding)
    conv.load_state_dict(adapted.conv.state_dict())
    before = reference.decode(LATENTS).sample
    adapted.conv = conv
    assert torch.equal(fast.decode(LATENTS).sample, reference.decode(LATENTS).sample) and not ours
    assert distance(fast.decode(LATENTS).sample, before) > 1e-2


METHODS = ("encode", "decode", "forward", "_encode", "_decode", "tiled_encode", "tiled_decode")


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_would_be_lost_are_named(name, monkeypatch):
    def own(self, *arguments, **keywords):
        return getattr(AutoencoderKLCogVideoX, name)(self, *arguments, **keywords)

    subclass = type("Subclass", (AutoencoderKLCogVideoX,), {name: own})
    by_class = subclass.from_config(family().config)
    by_instance = family()
    setattr(by_instance, name, lambda *_: None)
    patched = family()
    for vae in (by_class, by_instance, patched):
        if vae is patched:
            monkeypatch.setattr(AutoencoderKLCogVideoX, name, own)
        with pytest.raises(ValueError, match=rf"\.{name} is not diffusers' own .* override {name} of a subclass"):
            FastAutoencoderKLCogVideoX.adopt(vae)
        plan = choose_vae(torch.device("cpu"), torch.float32, True, None, vae)
        assert not plan.ours and f".{name} is not" in plan.why


def test_a_subclass_that_overrides_none_is_adopted(ours):
    subclass = type("Subclass", (AutoencoderKLCogVideoX,), {"more": 1})
    reference = subclass.from_config(family().config).eval()
    assert are_close(results(FastAutoencoderKLCogVideoX.adopt(reference)), results(reference)) and ours


def test_the_hook_of_a_device_map_goes_with_it(ours):
    reference = family()
    add_hook_to_module(reference, SequentialHook(AlignDevicesHook("cpu", io_same_device=True)))
    fast = FastAutoencoderKLCogVideoX.adopt(reference)
    assert fast._hf_hook is not reference._hf_hook and fast.forward.args[0] is fast
    assert all(a is b for a, b in zip(fast.parameters(), reference.parameters(), strict=True))
    assert are_close(results(fast), results(reference)) and ours
    assert distance(fast(PIXELS).sample, reference(PIXELS).sample) < 1e-5


def test_a_device_map_of_one_device_leaves_the_layers_ours(ours):
    reference = dispatch_model(family(), {"": "cpu"}, force_hooks=True)
    fast = FastAutoencoderKLCogVideoX.adopt(reference)
    assert are_close(results(fast), results(reference)) and ours
    assert fast.to(torch.float32) is fast
    fast.decoder.conv_out.conv.register_forward_hook(lambda *_: None)
    ours.clear()
    assert torch.equal(fast.decode(LATENTS).sample, reference.decode(LATENTS).sample) and not ours


@pytest.mark.parametrize(
    "hook",
    [CpuOffload("cpu"), AlignDevicesHook("cpu", offload=True), SequentialHook(CpuOffload("cpu"))],
    ids=lambda hook: type(hook).__name__,
)
def test_offloading_hooks_are_refused(hook):
    reference = family()
    add_hook_to_module(reference, hook)
    with pytest.raises(ValueError, match="it has offloading hooks already; make the pipeline fast first"):
        FastAutoencoderKLCogVideoX.adopt(reference)
    fast = FastAutoencoderKLCogVideoX.adopt(family())
    add_hook_to_module(fast, CpuOffload("cpu"))
    assert choose_vae(torch.device("cpu"), torch.float32, True, None, fast).ours  # it is made fast


def test_training_after_inference_mode(fresh):
    reference, fast = fresh
    with torch.inference_mode():
        for vae in fresh:
            results(vae, LATENTS.clone(), PIXELS.clone())
        stream = fast.decode_stream(LATENTS.clone())
        chunks = [next(stream)]
    expected = reference.decode(LATENTS).sample
    assert distance(torch.cat([*chunks, *stream], dim=2), expected) < 1e-5
    gradients = []
    with torch.enable_grad():
        for vae in fresh:
            vae.train()
            vae(PIXELS).sample.square().mean().backward()
            gradients.append([parameter.grad.clone() for parameter in vae.parameters()])
            vae.zero_grad()
    assert are_equal(*gradients)


def test_the_default_dtype_changes_nothing(tmp_path):
    fast = FastAutoencoderKLCogVideoX.adopt(family())
    fast.memory_budget = 2**20
    torch.save((fast, LATENTS, PIXELS, results(fast)), tmp_path / "given.pt")
    script = """
import sys, torch
vae, latents, pixels, expected = torch.load(sys.argv[1], weights_only=False)
for default in (torch.bfloat16, torch.float16, torch.float64):
    torch.set_default_dtype(default)
    with torch.no_grad():
        outputs = vae.decode(latents).sample, vae.encode(pixels).latent_dist.parameters
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True)), default
    assert torch.equal(torch.cat(list(vae.decode_stream(latents)), dim=2), expected[0]), default
"""
    subprocess.run([sys.executable, "-c", script, tmp_path / "given.pt"], check=True)


def test_the_default_device_changes_nothing(pair):
    expected = results(pair[1])
    with torch.device("meta"):
        assert are_equal(results(pair[1]), expected)


def test_threads_on_one_autoencoder(pair):
    fast = pair[1]
    given = [randn(1, 16, time, 2, width, seed=time) for time, width in ((2, 3), (3, 2), (5, 4), (6, 1))]
    expected = [fast.decode(latents).sample for latents in given]

    def decode(number):
        with torch.no_grad():
            if number % 2:
                return torch.cat(list(fast.decode_stream(given[number % 4])), dim=2)
            return fast.decode(given[number % 4]).sample

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for number, output in enumerate(pool.map(decode, range(24))):
            assert torch.equal(output, expected[number % 4])


def test_a_generation_says_how_it_runs(fresh, monkeypatch, ours):
    """Of two autoencoders only the one that is in a generation runs by its plan."""
    reference, fast = fresh
    other = FastAutoencoderKLCogVideoX.adopt(reference)
    plans = {}

    class Generation:
        plan = property(lambda self: self)

        def __init__(self, vae):
            self.vae, self.ran, self.ranks = vae, session.Ran(), None

    monkeypatch.setattr(session, "current", lambda vae: plans.get(vae))
    place = torch.device("cpu"), torch.float32
    unlimited = fast.plan_decode(LATENTS.shape)
    plans[fast] = Generation(VaePlan(*place, budget=unlimited.peak - 2**16))
    sliced = fast.plan_decode(LATENTS.shape)
    assert sliced.peak <= unlimited.peak - 2**16 and other.plan_decode(LATENTS.shape).peak == unlimited.peak
    assert are_close(results(fast), results(reference)) and len(ours) == 3
    plans[fast] = Generation(choose_vae(*place, False, UNLIMITED, fast))
    assert are_equal(results(fast), results(reference)) and len(ours) == 3
    plans[fast] = Generation(VaePlan(torch.device("cuda"), torch.float16, operations="triton", convolution="triton"))
    assert are_close(results(fast), results(reference)) and len(ours) == 6  # it was moved since
