import dataclasses
import gc

import pytest

from cogvx_fast.bench.provenance import Provenance
from cogvx_fast.bench.rows import Row
from cogvx_fast.bench.workloads import Workload
from tests import toy

PROVENANCE = Provenance(
    device="cpu",
    device_name="Some CPU (R)",
    cpu_name="Some CPU (R)",
    cpu_features=["AVX2"],
    cores=2,
    threads=2,
    memory_bytes=2**34,
    load_average=0.1,
    system="Linux 6",
    cuda=None,
    versions={"torch": "2.13.0", "diffusers": "0.42.1", "triton": None},
    git_commit="0123456789abcdef",
    git_dirty=False,
)


def row(contender="ours", p50=0.5, **overrides):
    """A row of a made-up run: what it says was never measured."""
    values = {
        "run": "run-1",
        "series": "contenders",
        "workload": "dit-2b",
        "stage": "dit-step",
        "measures": "one step",
        "shapes": {
            "layers": 3,
            "layers_of_the_real_model": 30,
            "batch": 2,
            "num_frames": 9,
            "height": 240,
            "width": 352,
            "tokens": 1216,
        },
        "dtype": "bfloat16",
        "contender": contender,
        "engine": {"tier": "exact"},
        "engine_report": ["attention: on: sdpa"],
        "command": "cogvx-fast bench run dit-2b --dtype bfloat16",
        "gate": "green",
        "gate_detail": "mean over 3 inputs",
        "reference": "diffusers, eager, float32",
        "error": 0.004,
        "own_error": 0.004,
        "budget": 0.0044,
        "n": 5,
        "p20_seconds": p50 * 0.9,
        "p50_seconds": p50,
        "p80_seconds": p50 * 1.1,
        "first_call_seconds": p50 * 2,
        "peak_memory_bytes": 123_000_000,
        "peak_memory_kind": "growth",
        "extras": {},
        "expected_gain": None,
        "expected_why": None,
        "provenance": PROVENANCE,
        "time": "2026-01-02T03:04:05.000+00:00",
    }
    return Row(**{**values, **overrides})


def refused(contender="wrong", **overrides):
    nothing = dict.fromkeys(
        ("p20_seconds", "p50_seconds", "p80_seconds", "first_call_seconds", "peak_memory_bytes"), None
    )
    red = {"gate": "red", "gate_detail": "error 2 is above the budget of 1", "error": 2.0, "n": 0}
    return row(contender, **{**nothing, **red, **overrides})


@pytest.fixture(scope="package", autouse=True)
def cheap_garbage_collection():
    """A run collects garbage several times: a quarter of a second each with all imported libraries to walk through."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def toy_workload(tmp_path_factory):
    """All stages of a pipeline of toy size, from a saved checkpoint."""
    folder = tmp_path_factory.mktemp("bench") / "toy"
    toy.pipeline().save_pretrained(folder)
    return Workload(
        name="toy",
        summary="toy",
        stages=("text", "dit-step", "vae-decode", "generation"),
        checkpoint=str(folder),
        steps=3,
        gate_samples=2,
        prompts=("a cat", "a dog"),
    )


@pytest.fixture
def toy_step(toy_workload):
    """Its DiT step alone."""
    return dataclasses.replace(toy_workload, stages=("dit-step",))
