"""The real workloads have the sizes that they state; shapes only, nothing of that size is made."""

import diffusers
import pytest
import torch

from cogvx_fast.bench.contenders import block_linears, flop
from cogvx_fast.bench.reference import STAGES, shapes
from cogvx_fast.bench.workloads import WORKLOADS


def empty_pipeline(workload):
    with torch.device("meta"):
        transformer = diffusers.CogVideoXTransformer3DModel(**workload.transformer)
    return diffusers.CogVideoXPipeline(None, None, None, transformer, None)


@pytest.mark.parametrize(
    ("name", "tokens", "layers", "dim"),
    [
        ("dit-2b", 1216, 3, 1920),
        ("dit-5b", 1216, 3, 3072),
        ("dit-2b-full", 17776, 30, 1920),
        ("dit-5b-full", 17776, 42, 3072),
        ("dit-1.5-full", 45106, 42, 3072),
    ],
)
def test_sizes(name, tokens, layers, dim):
    pipe = empty_pipeline(WORKLOADS[name])
    size = shapes(WORKLOADS[name], pipe)
    assert (size["tokens"], size["layers"], size["heads"] * size["head_dim"]) == (tokens, layers, dim)
    assert f"{tokens:,} tokens" in WORKLOADS[name].summary
    work = flop(WORKLOADS[name], pipe)
    assert work["attention_flop"] == 2 * 4 * tokens**2 * dim * layers
    blocks = 2 * 2 * tokens * 12 * dim**2 * layers
    assert blocks < work["linear_flop"] < 1.001 * blocks
    assert len(block_linears(pipe.transformer.transformer_blocks[0])) == 6


@pytest.mark.parametrize("name", ["dit-2b-full", "dit-5b-full", "dit-1.5-full"])
def test_a_step_of_a_whole_model_is_what_its_refusal_says(name):
    workload = WORKLOADS[name]
    tflop = sum(flop(workload, empty_pipeline(workload)).values()) / 1e12
    digits = 2 if tflop < 1000 else 1
    assert f"one step is {float(f'{tflop:.{digits}g}'):,.0f} TFLOP" in workload.needs_cuda


def test_every_workload_names_stages_that_exist_and_dtypes_of_torch():
    for name, workload in WORKLOADS.items():
        assert workload.name == name and set(workload.stages) <= set(STAGES)
        assert all(isinstance(getattr(torch, dtype), torch.dtype) for dtype in workload.dtypes)
        assert workload.checkpoint is not None or None not in (workload.num_frames, workload.height, workload.width)
