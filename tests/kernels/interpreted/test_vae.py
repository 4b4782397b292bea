"""The fast autoencoder with every layer as Triton kernels, interpreted: as close to fp32 as diffusers is."""

import copy

import pytest
import torch
from triton.runtime import interpreter

from cogvx_fast.vae import FastAutoencoderKLCogVideoX, chunks, ledger
from tests.kernels.triton_operations import watch
from tests.vae.conftest import distance, family, randn, run_with
from tests.vae.test_slicing import Allocations, Everywhere, smallest

KERNELS = ("group_norm_statistics", "group_norm_modulate_silu", "causal_conv3d", "upsample_conv2d")


@pytest.fixture(autouse=True)
def outputs(monkeypatch):
    """The plain allocator: diffusers' own code is among what runs here."""
    run_with("triton", monkeypatch)
    with torch.no_grad():
        yield


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh frames hold NaN; the interpreter's own copies of indices cannot."""
    new_empty = torch.Tensor.new_empty

    def filled(*arguments, **keywords):
        tensor = new_empty(*arguments, **keywords)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


@pytest.fixture
def calls(monkeypatch):
    names = []
    for name in KERNELS:
        watch(monkeypatch, name, lambda *_, name=name: names.append(name))
    return names


def small(dtype):
    """One of the levels halves the channels. Few pixels: a tile of any layer is one program."""
    truth = family(block_out_channels=(8, 16, 16, 16), layers_per_block=1)
    reference = copy.deepcopy(truth).to(dtype)
    return truth, reference, FastAutoencoderKLCogVideoX.adopt(reference)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("dtype", "time", "size"),
    [pytest.param(torch.float16, 4, 2, marks=pytest.mark.kernels_all), (torch.bfloat16, 2, 1)],
    ids=str,
)
def test_decodes_what_diffusers_decodes(dtype, time, size, calls):
    """In chunks, the later ones with the past of those before them; of one frame each, also with its past's past."""
    truth, reference, fast = vaes = small(dtype)
    for vae in vaes:
        vae.num_latent_frames_batch_size = size
    latents = randn(1, 16, time, 1, 2, seed=time).to(dtype)
    expected = truth.decode(latents.float()).sample
    own, output = (distance(vae.decode(latents).sample, expected) for vae in (reference, fast))
    assert output <= 1.1 * own
    resnets = sum(type(module).__name__ == "CogVideoXResnetBlock3D" for module in truth.decoder.modules())
    chunks = time // size
    norms = chunks * (2 * resnets + 1)
    expected = dict(zip(KERNELS, (norms, norms, norms + chunks, 3 * chunks), strict=True))
    assert {name: calls.count(name) for name in KERNELS} == expected


@pytest.mark.usefixtures("poisoned")
def test_encodes_what_diffusers_encodes(calls):
    truth, reference, fast = small(torch.float16)
    pixels = randn(1, 3, 9, 8, 8).half()
    expected = truth.encode(pixels.float()).latent_dist.parameters
    own, output = (distance(vae.encode(pixels).latent_dist.parameters, expected) for vae in (reference, fast))
    assert output <= 1.1 * own and calls.count("causal_conv3d") > 10


@pytest.mark.usefixtures("poisoned")
def test_slices_of_rows_are_the_same_numbers(monkeypatch):
    fast = small(torch.float16)[2]
    fast.num_latent_frames_batch_size = 1
    latents = randn(1, 16, 2, 1, 1).half()
    expected = fast.decode(latents).sample
    everywhere, sliced = chunks.SlicingPlan(rows=Everywhere(all=5), frames_at_once=Everywhere(all=5)), []
    monkeypatch.setattr(fast, "plan_decode", lambda *_: everywhere)
    watch(monkeypatch, "causal_conv3d", lambda *a: sliced.append(a[5].shape[2]))
    assert torch.equal(fast.decode(latents).sample, expected)
    assert set(sliced) == {1, 2, 4, 5, 3}


@pytest.mark.parametrize("time", [2, 7])
def test_the_peak_is_the_bytes_allocated(monkeypatch, time):
    """Of what is launched nothing is run: only the memory counts."""
    monkeypatch.setattr(interpreter.InterpretedFunction, "run", lambda *_, **__: None)
    monkeypatch.setattr(ledger, "WORKSPACE", 2**21)
    fast = FastAutoencoderKLCogVideoX.adopt(family().half())
    shape = (2, 16, time, 6, 8)
    latents, least = randn(*shape).half(), smallest(fast, shape)
    fast.memory_budget = None
    most = fast.plan_decode(shape).peak
    # Not the least, where torch upsamples: its convolution in half precision copies its result on a CPU.
    for budget in (None, (most + least) // 2):
        fast.memory_budget = budget
        plan = fast.plan_decode(shape)
        with Allocations() as allocations:
            fast.decode(latents)
        assert 0.93 * plan.peak <= allocations.peak <= 1.002 * plan.peak, (plan, allocations.peak)
