"""Rehearsals of the workloads that need a GPU: the same stages, contenders and gates at toy size on a CPU."""

import dataclasses

import pytest
import torch

from cogvx_fast.bench.comparison import Comparison
from cogvx_fast.bench.reference import build_pipeline, first_layers, shapes
from cogvx_fast.bench.series import Plan
from cogvx_fast.bench.workloads import WORKLOADS, rehearsed

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FULL = ("dit-2b-full", "dit-5b-full", "dit-1.5-full", "vae-full")


def test_all_that_need_a_gpu_can_be_rehearsed():
    assert set(FULL) == {name for name, workload in WORKLOADS.items() if workload.needs_cuda} == set(rehearsed())
    with pytest.raises(ValueError, match="dit-2b has no toy size; those that have: dit-2b-full"):
        WORKLOADS["dit-2b"].rehearsal()


@pytest.mark.parametrize("name", FULL)
def test_a_rehearsal_is_of_the_same_kind_under_another_name(name):
    whole, toy = WORKLOADS[name], WORKLOADS[name].rehearsal()
    same = ("stages", "dtypes", "contenders", "gate_samples", "warmup")
    assert all(getattr(whole, field) == getattr(toy, field) for field in same)
    assert (toy.name, toy.needs_cuda, toy.is_rehearsal) == (f"{name}-toy", None, True)
    assert (whole.gate_layers is None) == (toy.gate_layers is None)
    for key in ("use_rotary_positional_embeddings", "patch_size_t", "patch_bias"):
        assert whole.transformer.get(key) == toy.transformer.get(key)
    toy.check("cpu")


@pytest.mark.parametrize("name", FULL)
def test_contenders_on_a_gpu_are_all_that_the_workload_names(name):
    chosen, left_out = Comparison.chosen(WORKLOADS[name], "bfloat16", GPU)
    assert tuple(chosen) == WORKLOADS[name].contenders and not left_out
    assert next(iter(chosen)) == "diffusers"


@pytest.mark.parametrize("name", [name for name in FULL if name != "vae-full"])
def test_a_rehearsed_step_makes_the_rows(name):
    workload = WORKLOADS[name].rehearsal()
    wanted = [name for name in workload.contenders if "compile" not in name]
    plan = Plan(dataclasses.replace(workload, contenders=wanted), "bfloat16", "cpu", "x")
    left_out = Comparison.left_out(plan)
    rows = Comparison.run(plan)
    assert [row.contender for row in rows] == [one for one in wanted if one not in left_out]
    assert set(left_out) <= {"ours-triton", *(f"attention-{by}" for by in ("cudnn", "flash", "efficient", "triton"))}
    for row in rows:
        bound = row.contender in ("arithmetic", "products", "attention")
        assert row.gate == ("none" if bound else "green"), row.gate_detail
        assert row.n == 5 and row.workload == workload.name and "a rehearsal at toy size" in row.measures
        judged = workload.gate_layers is not None and not bound
        assert ("judged on 2 of 3 layers" in row.gate_detail) == judged
        assert row.gpu_state is None and row.shapes["tokens"] == 8 + 2 * 3 * (2 if "1.5" in name else 3)
    parts = {row.contender: set(row.extras) for row in rows}
    flop = {"linear_flop", "attention_flop"}
    if "products" in parts:
        assert (parts["arithmetic"], parts["products"], parts["attention"]) == (
            flop,
            {"linear_flop"},
            {"attention_flop"},
        )


def test_a_rehearsed_autoencoder_makes_the_rows():
    workload = WORKLOADS["vae-full"].rehearsal()
    names = ["diffusers", "ours", "ours-cudnn-conv"]
    rows = Comparison.run(Plan(workload, "bfloat16", "cpu", "x", names))
    assert [(row.stage, row.contender) for row in rows] == [
        (stage, name) for stage in workload.stages for name in names
    ]
    assert all(row.gate == "green" for row in rows), [row.gate_detail for row in rows]
    assert all("these by torch" in row.measures for row in rows if row.contender == "ours-cudnn-conv")


def test_the_gates_layers_are_those_of_the_whole_model():
    workload = WORKLOADS["dit-5b-full"].rehearsal()
    pipe = build_pipeline(workload, torch.float32, CPU)
    part = first_layers(pipe, 2)
    assert first_layers(pipe, None) is pipe
    assert shapes(workload, part)["layers"] == 2 and shapes(workload, pipe)["layers"] == 3
    assert len(pipe.transformer.transformer_blocks) == 3
    whole = dict(pipe.transformer.named_parameters())
    own = dict(part.transformer.named_parameters())
    assert set(own) == {name for name in whole if not name.startswith("transformer_blocks.2.")}
    assert all(own[name] is whole[name] for name in own)
