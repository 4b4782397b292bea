"""Calls in a process of their own give what they give here, and their failure is told."""

import dataclasses

import pytest
import torch

from cogvx_fast import EngineConfig, FastCogVideoXPipeline, demo_checkpoint
from cogvx_fast.bench.fresh_process import call, cold_start

pytestmark = pytest.mark.slow


def order():
    pipe = FastCogVideoXPipeline.from_pretrained(demo_checkpoint(), dtype=torch.float32)
    config = pipe.transformer.config
    shape = (1, (config.sample_frames - 1) // 4 + 1, config.in_channels, config.sample_height, config.sample_width)
    arguments = {"prompt": "a red circle stays still on white", "num_inference_steps": 1}
    noise = {"shape": shape, "seed": 3, "dtype": "float32"}
    engine = dataclasses.asdict(EngineConfig())
    whole = {"checkpoint": demo_checkpoint(), "dtype": "float32", "engine": engine, "arguments": arguments}
    return pipe, whole | {"noise": noise}


def test_a_function_is_called_in_another_process_with_its_environment():
    assert call("os:getenv", "COGVX_TEST", {"COGVX_TEST": "set"}) == "set"
    assert call("os:getenv", "COGVX_TEST") is None
    assert call("math:prod", [2, 3]) == 6


def test_frames_are_those_of_a_generation_here():
    pipe, given = order()
    noise = torch.randn(given["noise"]["shape"], generator=torch.Generator().manual_seed(3))
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(**given["arguments"], latents=noise, output_type="pt").frames
    for engine in (given["engine"], None):
        frames = cold_start(given | {"engine": engine})
        assert frames.shape == expected.shape and (frames - expected).abs().max() < 1e-4


def test_a_failure_is_told():
    with pytest.raises(RuntimeError, match=r"the fresh process failed: .*nowhere"):
        call("os:listdir", "/nowhere")
