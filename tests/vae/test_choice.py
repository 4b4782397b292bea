"""Which code runs the autoencoder, by what it depends on."""

import pytest
import torch
from torch import nn

from cogvx_fast.plan import UNLIMITED, VaePlan
from cogvx_fast.vae import FastAutoencoderKLCogVideoX, choose_vae
from tests.availability import set_missing

from .conftest import family

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def machine(monkeypatch):
    """A machine of the test's making: does it have a compiler, AMX and Triton?"""

    def make(compiler=True, amx=False, triton=True):
        ours = dict.fromkeys(("cpu", "direct", "winograd"), None if compiler else "no compiler")
        set_missing(monkeypatch, ours | {"triton": None if triton else "no Triton"})
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)

    return make


@pytest.mark.parametrize(
    ("has", "device", "dtype", "operations", "convolution"),
    [
        ({}, CPU, torch.float32, "cpu", "cpu"),
        ({}, CPU, torch.bfloat16, "cpu", "cpu"),
        ({"amx": True}, CPU, torch.bfloat16, "cpu", "torch"),
        ({"amx": True}, CPU, torch.float32, "cpu", "cpu"),
        ({}, CPU, torch.float64, "torch", "torch"),
        ({"compiler": False}, CPU, torch.float32, "torch", "torch"),
        ({"compiler": False}, CPU, torch.bfloat16, "torch", "torch"),
        ({}, CUDA, torch.float16, "triton", "triton"),
        ({}, CUDA, torch.bfloat16, "triton", "triton"),
        ({}, CUDA, torch.float32, "torch", "torch"),
        ({"triton": False}, CUDA, torch.bfloat16, "torch", "torch"),
    ],
)
def test_what_computes(machine, has, device, dtype, operations, convolution):
    machine(**has)
    expected = VaePlan(device, dtype, operations=operations, convolution=convolution, budget=5)
    assert choose_vae(device, dtype, True, 5, family()) == expected


@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fast", [True, None, False])
def test_whether_ours_run(machine, compiler, dtype, fast):
    machine(compiler=compiler)
    plan = choose_vae(CPU, dtype, fast, None, family())
    rounds_more = fast is None and dtype == torch.float32 and not compiler
    assert plan.ours == (not rounds_more and fast is not False)
    assert plan.budget == UNLIMITED and plan.ours == (plan.why == "")
    assert ("without our C++ (no compiler)" in plan.why) == rounds_more
    assert (plan.why == "EngineConfig.fast_vae=False") == (fast is False)


@pytest.mark.parametrize(
    ("autoencoder", "why"),
    [
        (lambda: None, "there is none"),
        (lambda: nn.Linear(1, 1), "it is a Linear, not an AutoencoderKLCogVideoX"),
        (lambda: family(act_fn="gelu"), "its activation is 'gelu'"),
        (lambda: FastAutoencoderKLCogVideoX.adopt(family()), ""),
    ],
)
def test_what_cannot_be_adopted(autoencoder, why):
    plan = choose_vae(CPU, torch.bfloat16, True, UNLIMITED, autoencoder())
    assert plan.why.startswith(why) and plan.ours == (why == "")
