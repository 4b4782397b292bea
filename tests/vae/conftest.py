import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from cogvx_fast.plan import VaePlan
from cogvx_fast.vae import FastAutoencoderKLCogVideoX, model
from cogvx_fast.vae.choice import default_plan
from tests import toy


def family(**overrides):
    """The family's configuration, two layers a level and few channels, of other widths at each level as there."""
    config = {
        "block_out_channels": (8, 16, 16, 32),
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "temporal_compression_ratio": 4,
    }
    return toy.randomize(AutoencoderKLCogVideoX(**(config | overrides)), seed=3).eval()


@pytest.fixture(scope="session")
def pair():
    """diffusers' model and ours of the same weights. Leave their settings as they are."""
    reference = family()
    return reference, FastAutoencoderKLCogVideoX.adopt(reference)


@pytest.fixture
def fresh():
    reference = family()
    return reference, FastAutoencoderKLCogVideoX.adopt(reference)


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory holds NaN, so that what a layer forgets to write is seen."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan")))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distance(output, expected):
    assert output.shape == expected.shape
    assert torch.isfinite(expected).all() and expected.float().std() > 0
    return ((output.double() - expected.double()).norm() / expected.double().norm()).item()


def run_with(impl, monkeypatch):
    """Everything is computed by `impl`, "torch", "cpu" or "triton", for the rest of the test."""
    if impl == "cpu" and default_plan(torch.device("cpu"), torch.float32).convolution != "cpu":
        pytest.skip("no C++ compiler")

    def plan(device, dtype, budget=0):
        return VaePlan(device, dtype, operations=impl, convolution=impl, budget=budget or 0)

    monkeypatch.setattr(model, "default_plan", plan)
