"""The ablation's rows, from diffusers to the whole engine, with what was expected of each."""

import dataclasses

import pytest
import torch

from cogvx_fast import EngineConfig
from cogvx_fast.bench.ablation import ADDITIONS, VAE_ADDITIONS, Ablation
from cogvx_fast.bench.series import Plan
from cogvx_fast.bench.workloads import WORKLOADS

from .conftest import row

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def of(name, dtype, device=CPU):
    return Ablation.contenders(WORKLOADS[name], dtype, device)


def test_the_whole_engine_is_what_all_additions_make():
    options = {name: value for addition in ADDITIONS for name, value in addition.options.items()}
    assert EngineConfig(**options) == EngineConfig()


@pytest.mark.parametrize("additions", [ADDITIONS, VAE_ADDITIONS])
def test_what_is_expected_has_a_reason(additions):
    assert all(bool(addition.why) == bool(addition.expected) for addition in additions)


def test_expectations_are_for_the_workload_they_were_made_for():
    known, other = of("dit-2b", "bfloat16"), of("demo", "bfloat16")
    assert list(known) == list(other) == ["diffusers", *(addition.name for addition in ADDITIONS)]
    assert known["joint stream"].expected_gain == ADDITIONS[0].expected["dit-2b bfloat16"]
    assert all(contender.expected_gain is contender.expected_why is None for contender in other.values())
    assert of("vae-clip", "bfloat16")["our layers"].expected_gain is None
    assert list(of("vae", "float16")) == ["diffusers"]


@pytest.mark.parametrize("name", ["dit-2b", "vae"])
def test_what_was_predicted_for_a_cpu_is_not_expected_of_a_gpu(name):
    assert any(contender.expected_gain for contender in of(name, "bfloat16").values())
    assert not any(contender.expected_gain for contender in of(name, "bfloat16", GPU).values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_on_a_gpu_no_state_of_the_autoencoder_is_one_of_a_cpu(dtype):
    chosen, left_out = Ablation.chosen(WORKLOADS["vae"], dtype, GPU)
    assert list(chosen) == [
        "diffusers",
        "channels-last weights",
        "our layers",
        "+ norms in one pass, in Triton",
        "+ our convolutions, in Triton",
    ]
    options = [contender.build.keywords for contender in list(chosen.values())[2:]]
    assert options == [
        {"operations": "torch", "convolution": "torch"},
        {"operations": "triton", "convolution": "torch"},
        {"operations": "triton", "convolution": "triton"},
    ]
    assert left_out == dict.fromkeys(("+ norms in one pass", "+ our convolutions"), "it runs on cpu, not on cuda:0")
    with pytest.raises(ValueError, match=r"contender '\+ our convolutions': it runs on cpu, not on cuda:0"):
        Ablation.chosen(WORKLOADS["vae"], dtype, GPU, ["diffusers", "+ our convolutions"])


def test_on_a_cpu_no_state_is_one_of_a_gpu():
    chosen, left_out = Ablation.chosen(WORKLOADS["vae"], "float32", CPU)
    assert list(chosen)[-1] == "+ our convolutions" and set(left_out.values()) == {"it runs on cuda, not on cpu"}
    chosen, left_out = Ablation.chosen(WORKLOADS["dit-2b"], "bfloat16", GPU)
    assert set(left_out) == {"+ packed weights", "+ attention of our own"}
    assert list(chosen.values())[-1].build.keywords["config"] == EngineConfig()


def test_the_autoencoder_has_an_ablation_of_its_own(toy_workload):
    workload = dataclasses.replace(toy_workload, name="vae", stages=("vae-decode",))
    rows = Ablation.run(Plan(workload, "float32", "cpu", "x", warmup=0))
    on_a_cpu = [addition.name for addition in VAE_ADDITIONS if addition.devices != ("cuda",)]
    assert [row.contender for row in rows] == ["diffusers", *on_a_cpu]
    assert [row.gate for row in rows] == ["green", "lossy", "lossy", "lossy", "green"]
    assert all(row.error < 1e-5 and row.expected_gain for row in rows[1:])


def test_rows_carry_the_engine_and_what_was_expected(toy_step):
    workload = dataclasses.replace(toy_step, name="dit-2b")
    names = ["diffusers", "joint stream", "+ modulation table"]
    rows = Ablation.run(Plan(workload, "float32", "cpu", "x", names, warmup=0))
    assert [row.contender for row in rows] == names and {row.series for row in rows} == {"ablation"}
    assert [row.engine and row.engine["modulation_table"] for row in rows] == [None, False, True]
    assert [row.expected_gain for row in rows] == [None, None, 1.003] and "71 MB" in rows[2].expected_why


def test_the_table_says_what_each_row_gained_and_what_it_should():
    rows = [row("diffusers", 1.0, series="ablation"), row("+ a", 0.8, series="ablation", expected_gain=1.3)]
    lines = Ablation(rows).table().splitlines()
    assert lines[0].startswith("| stage | contender | time | x the row before | expected | x diffusers |")
    assert "| 1.25x | 1.300x | 1.25x |" in lines[3]
