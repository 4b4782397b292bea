"""The plan against the bytes that are allocated, and slices of rows against none."""

import copy
import dataclasses
import itertools
import re

import pytest
import torch
from accelerate import init_empty_weights
from cogvx_kernels import ops
from cogvx_kernels.conv3d import winograd
from diffusers import AutoencoderKLCogVideoX
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cogvx_fast import EngineConfig, accelerate
from cogvx_fast.plan import VaePlan
from cogvx_fast.vae import FastAutoencoderKLCogVideoX, chunks, convolution, ledger, model, slicing
from cogvx_fast.vae.slicing import BudgetError
from tests import toy

from .conftest import distance, family, randn, run_with

pytestmark = pytest.mark.slow


class Allocations(TorchDispatchMode):
    """The most bytes of tensors made inside that were alive at once."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        import weakref

        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, storage._cdata)
        return result

    def _freed(self, key):
        self.live -= self.sizes.pop(key)


@pytest.fixture(autouse=True)
def _without_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def fast():
    return FastAutoencoderKLCogVideoX.adopt(family())


def smallest(fast, shape):
    fast.memory_budget = 1
    with pytest.raises(ValueError, match=r"is too small for .* the smallest possible is") as raised:
        fast.plan_decode(shape)
    return int(str(raised.value).split(" bytes)")[0].rsplit("(", 1)[1])


def measured(call):
    with Allocations() as allocations:
        result = call()
    return result, allocations.peak


# Batches of two: of few small frames torch convolves one with code that is not channels-last and copies the result.
@pytest.mark.parametrize("impl", ["cpu", "torch"])
@pytest.mark.parametrize("time", [2, 3, 7])
def test_the_peak_is_the_bytes_allocated(fast, monkeypatch, impl, time):
    run_with(impl, monkeypatch)
    shape = (2, 16, time, 6, 8)
    latents, whole, least = randn(*shape), None, smallest(fast, shape)
    fast.memory_budget = None
    most = fast.plan_decode(shape).peak
    for budget in (None, (most + least) // 2, least):
        fast.memory_budget = budget
        plan = fast.plan_decode(shape)
        frames, peak = measured(lambda: fast.decode(latents).sample)
        assert 0.93 * plan.peak <= peak <= 1.002 * plan.peak, (plan, peak)
        assert budget is None or (plan.peak <= budget and plan.rows)
        whole = frames if whole is None else whole
        assert distance(frames, whole) < 2e-6
    fast.memory_budget = None


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="without oneDNN's bf16 torch's own convolutions, of 1x1, have buffers of 0.4% of the peak",
)
def test_the_peak_in_bf16_with_our_own_convolutions(monkeypatch):
    run_with("cpu", monkeypatch)
    monkeypatch.setattr(ops, "winograd_pays", lambda kernel, *_: winograd.takes(kernel))
    fast = FastAutoencoderKLCogVideoX.adopt(family().to(torch.bfloat16))
    latents, pixels = randn(2, 16, 5, 6, 8).bfloat16(), randn(2, 3, 9, 48, 64).bfloat16()
    for make, call, given in (
        (fast.plan_decode, fast.decode, latents),
        (fast.plan_encode, fast.encode, pixels),
    ):
        fast.memory_budget = 1
        with pytest.raises(BudgetError) as raised:
            make(tuple(given.shape))
        for budget in (None, raised.value.smallest):
            fast.memory_budget = budget
            plan = make(tuple(given.shape))
            _, peak = measured(lambda call=call, given=given: call(given))
            assert 0.93 * plan.peak <= peak <= 1.002 * plan.peak, (plan, peak)
            assert bool(plan.unpacked) == (budget is not None)


def test_a_stream_holds_one_chunk(fast):
    shape = (2, 16, 9, 6, 8)

    def stream():
        for chunk in fast.decode_stream(randn(*shape)):
            del chunk

    _, peak = measured(stream)
    plan = fast.plan_decode(shape, keeps_output=False)
    assert plan.peak < fast.plan_decode(shape).peak
    assert 0.93 * plan.peak <= peak <= 1.01 * plan.peak


def test_the_peak_of_encoding(fast):
    pixels = randn(2, 3, 17, 48, 64)
    whole = None
    for budget in (None, "smallest"):
        if budget is not None:
            fast.memory_budget = 1
            with pytest.raises(ValueError, match="smallest possible") as raised:
                fast.plan_encode(tuple(pixels.shape))
            fast.memory_budget = int(re.search(r"\((\d+) bytes", str(raised.value))[1])
        posterior, peak = measured(lambda: fast.encode(pixels).latent_dist.parameters)
        plan = fast.plan_encode(tuple(pixels.shape))
        assert 0.93 * plan.peak <= peak <= 1.002 * plan.peak
        assert bool(plan.spilled) == (budget is not None)
        whole = posterior if whole is None else whole
        assert distance(posterior, whole) < 2e-6
    fast.memory_budget = None


# Of the family's own VAE, two bytes a number, as on a GPU.
@pytest.mark.parametrize("device", ["cpu", "cpu with AMX", "cuda"])
@pytest.mark.parametrize(("budget", "slices"), [("4GiB", 32), ("1.5GiB", 1)])
def test_the_family_at_its_own_size_fits(budget, slices, device):
    with init_empty_weights():
        vae = FastAutoencoderKLCogVideoX.adopt(AutoencoderKLCogVideoX())
    shape, limit = (1, 16, 13, 60, 90), EngineConfig(vae_memory=budget).vae_memory
    dtype, operations, convolution = {
        "cpu": (torch.bfloat16, "cpu", "cpu"),
        "cpu with AMX": (torch.bfloat16, "cpu", "torch"),
        "cuda": (torch.float16, "triton", "triton"),
    }[device]
    device = torch.device(device.split()[0])
    plan = VaePlan(device, dtype, operations=operations, convolution=convolution, budget=limit)
    plan = slicing.plan_decode(vae, shape, chunks.Spans(13, 2), plan)
    assert plan.peak <= limit and min(plan.rows.values()) >= slices
    assert plan.spilled_bytes < 2**30 if budget == "4GiB" else plan.spilled_bytes < 3 * 2**30


class InTurn(chunks.Spans):
    """Spans that are gone through one by one."""

    def alike(self):
        return ((span, 1) for span in self)


@pytest.mark.parametrize("keeps_output", [True, False])
@pytest.mark.parametrize("length", [9, 12, 23])
def test_chunks_that_are_alike_are_counted_once(length, keeps_output):
    with init_empty_weights():
        vae = FastAutoencoderKLCogVideoX.adopt(AutoencoderKLCogVideoX())
    shape, cpu = (1, 16, length, 30, 45), torch.device("cpu")
    for kind, budget in itertools.product(("cpu", "torch", "triton"), ("64GiB", "1GiB", "600MiB", "smallest")):
        operations = "triton" if kind == "triton" else "cpu"
        plan = VaePlan(cpu, torch.bfloat16, operations=operations, convolution=kind, budget=1)
        with pytest.raises(BudgetError) as refused:
            slicing.plan_decode(vae, shape, chunks.Spans(length, 2), plan, keeps_output)
        with pytest.raises(BudgetError) as in_turn:
            slicing.plan_decode(vae, shape, InTurn(length, 2), plan, keeps_output)
        assert refused.value.smallest == in_turn.value.smallest
        limit = refused.value.smallest if budget == "smallest" else EngineConfig(vae_memory=budget).vae_memory
        for budget in {0, max(limit, refused.value.smallest)}:
            plan = dataclasses.replace(plan, budget=budget)
            together = slicing.plan_decode(vae, shape, chunks.Spans(length, 2), plan, keeps_output)
            assert together == slicing.plan_decode(vae, shape, InTurn(length, 2), plan, keeps_output)
    pixels = (1, 3, 8 * length + 1, 240, 360)
    plan = dataclasses.replace(plan, budget=2**30)
    assert slicing.plan_encode(vae, pixels, chunks.Spans(pixels[2], 8), plan) == slicing.plan_encode(
        vae, pixels, InTurn(pixels[2], 8), plan
    )


def test_any_length_is_planned_at_once():
    with init_empty_weights():
        vae = FastAutoencoderKLCogVideoX.adopt(AutoencoderKLCogVideoX())
    plans = [vae.plan_decode((1, 16, length, 2, 2), keeps_output=False) for length in (9, 10**15 + 1, 10**400 + 1)]
    assert plans[0].peak == plans[1].peak == plans[2].peak
    assert vae.plan_decode((1, 16, 10**400 + 1, 2, 2)).peak > 10**400
    assert str(vae.plan_decode((1, 16, 10**400 + 1, 2, 2))).startswith("peak more than 2^60 bytes in")


class Everywhere(dict):
    """The same number for every layer."""

    def get(self, key, default=None):
        return self["all"]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("impl", ["cpu", "torch"])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 23, 24, 100])
def test_slices_of_any_height_give_the_same(fast, monkeypatch, rows, impl):
    run_with(impl, monkeypatch)
    latents, pixels = randn(2, 16, 5, 3, 4), randn(1, 3, 17, 25, 16)
    expected = fast.decode(latents).sample, fast.encode(pixels).latent_dist.parameters
    everywhere = chunks.SlicingPlan(rows=Everywhere(all=rows), frames_at_once=Everywhere(all=rows))
    for name in ("plan_decode", "plan_encode"):
        monkeypatch.setattr(fast, name, lambda *_: everywhere)
    sliced = []
    for kind in (convolution.TorchConvolution, convolution.WinogradConvolution):
        monkeypatch.setattr(
            kind, "__call__", lambda self, b, *a, _=kind.__call__, **k: sliced.append(b.shape[2]) or _(self, b, *a, **k)
        )
    assert distance(fast.decode(latents).sample, expected[0]) < 2e-6
    assert distance(fast.encode(pixels).latent_dist.parameters, expected[1]) < 2e-6
    assert max(sliced) == min(rows, 25) + 2


def test_a_workspace_too_large_is_sliced_without_a_budget(fast, monkeypatch):
    shape = (1, 16, 2, 6, 8)
    before = fast.plan_decode(shape)
    monkeypatch.setattr(ledger, "WORKSPACE", 2**18)
    after = FastAutoencoderKLCogVideoX.adopt(fast.as_reference()).plan_decode(shape)
    assert not before.rows and after.rows and after.peak < before.peak


def test_a_plan_is_made_once_for_what_it_depends_on(fast):
    shape = (1, 16, 2, 6, 8)
    first = fast.plan_decode(shape)
    assert fast.plan_decode(shape) is first and fast.plan_decode(shape, keeps_output=False) is not first
    fast.memory_budget = first.peak - 2**16
    assert fast.plan_decode(shape).peak < first.peak
    fast.memory_budget = None
    assert fast.plan_decode(shape) is first
    for width in range(1, model.KEPT_PLANS + 1):
        fast.plan_decode((1, 16, 2, 6, width))
    assert fast.plan_decode(shape) is not first
    first = fast.plan_decode(shape)
    own = fast.decoder
    fast.decoder = copy.deepcopy(own)  # a plan names layers
    assert fast.plan_decode(shape) is not first
    fast.decoder = own
    assert fast.plan_decode(shape) is first


def test_the_budget_is_an_option_of_the_engine():
    reference = toy.pipeline()
    roomy, narrow = (
        accelerate(reference, EngineConfig(fast_vae=True)),
        accelerate(reference, EngineConfig(vae_memory="1.25MiB")),
    )
    latents = randn(1, 5, 16, 4, 4)
    frames = [pipe.decode_latents(latents) for pipe in (roomy, narrow)]
    assert distance(frames[1], frames[0]) < 2e-6
    lines = [str(pipe.engine_report().lines[-1].detail) for pipe in (roomy, narrow)]
    assert re.search(r"MiB in a temporary file in .* planned for latents of 1x5x4x4", lines[1])
    assert "temporary file" not in lines[0]
    impossible = accelerate(narrow, EngineConfig(vae_memory=4096))
    assert "will refuse" in impossible.engine_report().lines[-1].detail
    with pytest.raises(ValueError, match=r"a budget of 0.00 MiB is too small .* the smallest possible is .* MiB"):
        impossible.decode_latents(latents)
    assert torch.equal(narrow.decode_latents(latents), frames[1])


@pytest.mark.parametrize("value", ["4 GiB", "4GiB", 2**32, "4096MiB", "4294967296B"])
def test_sizes_in_words(value):
    assert EngineConfig(vae_memory=value).vae_memory == 2**32


@pytest.mark.parametrize("value", ["4.5", "4 gigs", "-1GiB", 0, -5, 1.5, True, "0MiB"])
def test_sizes_that_are_none(value):
    with pytest.raises(ValueError, match=r"EngineConfig.vae_memory=.* must be a number of bytes or a string such as"):
        EngineConfig(vae_memory=value)


def test_a_budget_needs_the_layers_that_keep_it():
    with pytest.raises(ValueError, match="vae_memory needs fast_vae=True"):
        EngineConfig(vae_memory="4GiB", fast_vae=False)
