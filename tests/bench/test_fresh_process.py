"""Calls in a process of their own give what they give here, and their failure is told."""

import dataclasses
import types

import pytest
import torch

from cogvx_fast import EngineConfig, FastCogVideoXPipeline, demo_checkpoint
from cogvx_fast.bench import fresh_process, reference
from cogvx_fast.bench.fresh_process import call, cold_start
from cogvx_fast.bench.workloads import WORKLOADS


def order():
    pipe = FastCogVideoXPipeline.from_pretrained(demo_checkpoint(), dtype=torch.float32)
    config = pipe.transformer.config
    shape = (1, (config.sample_frames - 1) // 4 + 1, config.in_channels, config.sample_height, config.sample_width)
    arguments = {"prompt": "a red circle stays still on white", "num_inference_steps": 1}
    noise = {"shape": shape, "seed": 3, "dtype": "float32"}
    engine = dataclasses.asdict(EngineConfig())
    whole = {"checkpoint": demo_checkpoint(), "dtype": "float32", "engine": engine, "arguments": arguments}
    return pipe, whole | {"noise": noise, "device": "cpu", "tf32_convolutions": False}


def test_a_cold_start_is_told_the_device_of_the_pipeline(monkeypatch):
    ordered = []
    monkeypatch.setattr(reference, "cold_start", ordered.append)
    config = types.SimpleNamespace(
        sample_frames=9, sample_height=4, sample_width=4, in_channels=16, patch_size_t=None, max_text_seq_length=8
    )
    second = torch.device("cuda", 1)
    transformer = types.SimpleNamespace(config=config, dtype=torch.bfloat16, device=second)
    pipe = types.SimpleNamespace(transformer=transformer, vae_scale_factor_spatial=8, vae_scale_factor_temporal=4)
    reference.STAGES["cold-start"].make(pipe, WORKLOADS["demo-cold"], torch.bfloat16)(0)
    assert ordered[0]["device"] == "cuda:1"


@pytest.mark.parametrize("rounds", [True, False])
def test_a_cold_start_rounds_convolutions_as_this_process_does(monkeypatch, rounds):
    """Else a reference in float32 would keep cuDNN's default, TF32."""
    pipe, ordered = order()[0], []
    monkeypatch.setattr(fresh_process, "call", lambda function, given: ordered.append(given) or {"vae": "cpu"})
    monkeypatch.setattr("safetensors.torch.load_file", lambda path: {"frames": torch.ones(1)})
    call_it = reference.STAGES["cold-start"].make(pipe, WORKLOADS["demo-cold"], torch.float32)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=rounds):
        call_it(0)
    assert ordered[0]["tf32_convolutions"] is rounds
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not rounds)
    monkeypatch.setattr(FastCogVideoXPipeline, "from_pretrained", stop)
    with pytest.raises(StoppedError):
        fresh_process.generate(ordered[0])
    assert torch.backends.cudnn.allow_tf32 is rounds


class StoppedError(Exception):
    pass


def stop(*arguments, **options):
    raise StoppedError


def test_the_process_runs_on_the_device_that_it_was_told(tmp_path, monkeypatch):
    asked = []
    plain = FastCogVideoXPipeline.to

    def to(self, device):
        asked.append(device)
        return plain(self, "cpu")  # what there is here

    monkeypatch.setattr(FastCogVideoXPipeline, "to", to)
    told = order()[1] | {"device": "cuda:1", "out": str(tmp_path / "frames.safetensors")}
    used = fresh_process.generate(told)
    assert used == dict.fromkeys(("transformer", "vae", "text_encoder"), "cpu") and asked == ["cuda:1"]


def test_a_process_that_ran_elsewhere_makes_no_row(monkeypatch):
    used = {"transformer": "cuda:1", "vae": "cpu", "text_encoder": "cuda:1"}
    monkeypatch.setattr(fresh_process, "call", lambda function, order: used)
    with pytest.raises(RuntimeError, match=r"was told to run on cuda:1 and ran vae on cpu$"):
        cold_start({"device": "cuda:1"})


@pytest.mark.slow
def test_a_function_is_called_in_another_process_with_its_environment():
    assert call("os:getenv", "COGVX_TEST", {"COGVX_TEST": "set"}) == "set"
    assert call("os:getenv", "COGVX_TEST") is None
    assert call("math:prod", [2, 3]) == 6


@pytest.mark.slow
def test_frames_are_those_of_a_generation_here():
    pipe, given = order()
    noise = torch.randn(given["noise"]["shape"], generator=torch.Generator().manual_seed(3))
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(**given["arguments"], latents=noise, output_type="pt").frames
    for engine in (given["engine"], None):
        frames = cold_start(given | {"engine": engine})
        assert frames.shape == expected.shape and (frames - expected).abs().max() < 1e-4


@pytest.mark.slow
def test_a_failure_is_told():
    with pytest.raises(RuntimeError, match=r"the fresh process failed: .*nowhere"):
        call("os:listdir", "/nowhere")
