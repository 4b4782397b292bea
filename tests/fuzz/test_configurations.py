"""Configurations of the engine, of models, of latents: a value that can be, or an error that names the field."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cogvx_fast import EngineConfig, FastCogVideoXPipeline
from cogvx_fast.checkpoint import CheckpointError, describe
from cogvx_fast.checkpoint.description import _LARGEST, CONFIGS
from tests import toy

from .harness import count, examples, limited
from .values import ANYTHING, JSON, REAL, WHOLE

FIELDS = [field.name for field in dataclasses.fields(EngineConfig)]
GOOD = {
    "tier": ["exact", "balanced", "turbo"],
    "speed": [2.0, 3, "fast"],
    "schedule": ["schedule.json", None],
    "recipe": ["int8", "fp8", "native", "balanced"],
    "memory_limit": ["4GiB", 2**30],
    "vae_memory": ["1GiB"],
    "attention": ["sdpa", "auto"],
    "compile": ["off", "blocks"],
}


@examples(150)
@given(data=st.data(), names=st.lists(st.sampled_from(FIELDS), unique=True, min_size=1, max_size=3))
def test_engine_configurations(data, names):
    values = {name: data.draw(st.one_of(st.sampled_from(GOOD.get(name, [True, False])), ANYTHING)) for name in names}
    with limited():
        try:
            config = EngineConfig(**values)
        except (ValueError, TypeError) as error:
            assert any(name in str(error) for name in (*names, "engine tier")), str(error)
            assert len(str(error)) < 2000
            count("configurations", "clear error")
            return
    assert EngineConfig(**dataclasses.asdict(config)) == config and hash(config) is not None
    count("configurations", "done")


INDEX = {
    "_class_name": "CogVideoXPipeline",
    "tokenizer": ["transformers", "T5Tokenizer"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
}


@examples(150)
@given(
    part=st.sampled_from(["index", *CONFIGS]),
    changes=st.dictionaries(
        st.sampled_from(sorted({*INDEX, *(key for keys in _LARGEST.values() for key in keys), "block_out_channels"})),
        st.one_of(WHOLE, REAL, JSON),
        min_size=1,
        max_size=3,
    ),
)
def test_configurations_of_models(part, changes):
    files = {"model_index.json": INDEX, **{name: {} for name in CONFIGS.values()}}
    name = "model_index.json" if part == "index" else CONFIGS[part]
    files[name] = files[name] | changes
    with limited():
        try:
            checkpoint, configs = describe("x", files.__getitem__)
        except CheckpointError as error:
            assert name in str(error) or "must be a CogVideoX" in str(error) or "its " in str(error)
            count("configurations", "clear error")
            return
    assert 1 <= checkpoint.variant.num_layers <= 1000 and checkpoint.num_train_timesteps >= 1
    assert all(isinstance(config, dict) for config in configs.values())
    count("configurations", "done")


@pytest.fixture(scope="module")
def pipe():
    return FastCogVideoXPipeline(**toy.pipeline().components)


@examples(40)
@given(
    shape=st.lists(st.integers(0, 20), max_size=6),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.float64]),
    num_frames=st.one_of(st.none(), st.integers(-3, 40)),
    other=st.one_of(st.just(None), ANYTHING),
)
def test_latents(pipe, shape, dtype, num_frames, other):
    latents = torch.zeros(shape, dtype=dtype) if other is None else other
    with limited():
        try:
            frames = torch.cat(list(pipe.decode_stream(latents, num_frames)), dim=2)
        except (ValueError, TypeError) as error:
            assert "latents" in str(error) or "num_frames" in str(error), str(error)
            count("configurations", "clear error")
            return
    assert num_frames is None or frames.shape[2] == num_frames
    count("configurations", "done")
