"""A generation in a process of its own gives what one here gives, and its failure is told."""

import dataclasses

import pytest
import torch

from cogvx_fast import EngineConfig, FastCogVideoXPipeline, demo_checkpoint
from cogvx_fast.bench.cold import in_a_fresh_process


def order(**changes):
    pipe = FastCogVideoXPipeline.from_pretrained(demo_checkpoint(), dtype=torch.float32)
    config = pipe.transformer.config
    shape = (1, (config.sample_frames - 1) // 4 + 1, config.in_channels, config.sample_height, config.sample_width)
    arguments = {"prompt": "a red circle stays still on white", "num_inference_steps": 1}
    noise = {"shape": shape, "seed": 3, "dtype": "float32"}
    engine = dataclasses.asdict(EngineConfig())
    whole = {"checkpoint": demo_checkpoint(), "dtype": "float32", "engine": engine, "arguments": arguments} | changes
    return pipe, whole | {"noise": noise}


def test_frames_are_those_of_a_generation_here():
    pipe, given = order()
    noise = torch.randn(given["noise"]["shape"], generator=torch.Generator().manual_seed(3))
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(**given["arguments"], latents=noise, output_type="pt").frames
    for engine in (given["engine"], None):
        frames = in_a_fresh_process(given | {"engine": engine})
        assert frames.shape == expected.shape and (frames - expected).abs().max() < 1e-4


def test_a_failure_is_told():
    with pytest.raises(RuntimeError, match=r"the fresh process failed: .*nowhere"):
        in_a_fresh_process(order(checkpoint="/nowhere")[1])
