"""from_pipe between tasks, to diffusers' classes and back: weights shared, dtype and engine kept."""

import diffusers
import pytest
import torch

import cogvx_fast
from cogvx_fast import (
    EngineConfig,
    FastCogVideoXImageToVideoPipeline,
    FastCogVideoXPipeline,
    FastCogVideoXVideoToVideoPipeline,
    accelerate,
)
from tests import toy

from .generations import assert_same, latents, picture

pytestmark = pytest.mark.slow

TASKS = ("", "VideoToVideo", "ImageToVideo", "FunControl")


def task_inputs(name):
    arguments = toy.inputs(num_steps=4, output_type="latent")
    if name == "VideoToVideo":
        arguments |= {"video": [picture()] * toy.NUM_FRAMES, "strength": 0.6}
    elif name == "ImageToVideo":
        arguments |= {"image": picture()}
    elif name == "FunControl":
        arguments |= {"control_video": [picture()] * toy.NUM_FRAMES}
    if name in ("VideoToVideo", "FunControl"):
        arguments.pop("num_frames")
    return arguments


def generate(pipe, name):
    pipe.set_progress_bar_config(disable=True)
    return pipe(**task_inputs(name)).frames


def classes(name):
    return getattr(diffusers, f"CogVideoX{name}Pipeline"), getattr(cogvx_fast, f"FastCogVideoX{name}Pipeline")


# Weights of 16 channels go from text to video to video to video and back, those of 32 between images and control.
ROUTES = [("2b", "", "VideoToVideo"), ("2b", "VideoToVideo", ""), ("5b-i2v", "ImageToVideo", "FunControl")]


@pytest.mark.parametrize("source_is_fast", [True, False])
@pytest.mark.parametrize(("variant", "source", "target"), ROUTES)
def test_to_another_task(variant, source, target, source_is_fast):
    """As diffusers' own from_pipe: the same result, or the same refusal."""
    reference_class, fast_class = classes(target)
    original = toy.pipeline(variant, cls=classes(source)[0])
    expected = generate(reference_class.from_pipe(original, dtype=torch.float32), target)
    start = accelerate(original) if source_is_fast else original
    pipe = fast_class.from_pipe(start, dtype=torch.float32)
    assert type(pipe) is fast_class
    assert_same(generate(pipe, target), expected)
    assert_same(generate(start, source), generate(original, source))


@pytest.mark.parametrize(("variant", "source", "target"), ROUTES)
def test_from_ours_to_diffusers(variant, source, target):
    """The way out: a plain pipeline that needs nothing of ours, with its own models and numbers."""
    reference_class, fast_class = classes(target)
    original = toy.pipeline(variant, cls=classes(source)[0])
    expected = generate(reference_class.from_pipe(original, dtype=torch.float32), target)
    fast = accelerate(original)
    generate(fast, source)
    plain = reference_class.from_pipe(fast, dtype=torch.float32)
    assert type(plain) is reference_class
    assert_same(generate(plain, target), expected)
    assert plain.transformer.proj_out.weight is original.transformer.proj_out.weight
    back = fast_class.from_pipe(plain, dtype=torch.float32)
    assert_same(generate(back, target), expected)
    assert_same(generate(fast, source), generate(original, source))


def test_there_and_back_through_every_task():
    original = toy.pipeline()
    expected = generate(original, "")
    pipe = accelerate(original)
    for cls in (FastCogVideoXVideoToVideoPipeline, FastCogVideoXPipeline) * 2:
        pipe = cls.from_pipe(pipe, dtype=torch.float32)
    assert_same(generate(pipe, ""), expected)
    assert pipe.transformer.proj_out.weight is original.transformer.proj_out.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("asked", [None, torch.bfloat16], ids=str)
def test_the_dtype_is_kept_unless_another_is_asked_for(dtype, asked):
    """Upstream's from_pipe casts to fp32 where none is asked for, the weights of the source too: ours casts nothing."""
    source = accelerate(toy.pipeline().to(dtype=dtype))
    pipe = classes("VideoToVideo")[True].from_pipe(source, **({} if asked is None else {"dtype": asked}))
    assert {model.dtype for model in (*models(pipe), *models(source))} == {asked or dtype}


def models(pipe):
    return pipe.transformer, pipe.vae, pipe.text_encoder


def test_torch_dtype_is_still_taken():
    """The name that published examples use."""
    source = accelerate(toy.pipeline().to(dtype=torch.bfloat16))
    pipe = FastCogVideoXVideoToVideoPipeline.from_pipe(source, torch_dtype=torch.bfloat16)
    assert all(model.dtype == torch.bfloat16 for model in models(pipe))


CONFIGS = {
    "balanced": "balanced",
    "int8-weight": EngineConfig(recipe="int8-weight"),
    "detail": EngineConfig(modulation_table=False, attention="sdpa", vae_memory="1GiB"),
    "off": EngineConfig(fast_vae=False),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_the_engine_is_kept(config):
    source = accelerate(toy.pipeline(), CONFIGS[config])
    pipe = FastCogVideoXVideoToVideoPipeline.from_pipe(source, dtype=torch.float32)
    assert pipe.engine_report().config == source.engine_report().config
    expected = accelerate(toy.pipeline(cls="CogVideoXVideoToVideoPipeline"), CONFIGS[config])
    assert_same(generate(pipe, "VideoToVideo"), generate(expected, "VideoToVideo"))
    back = FastCogVideoXPipeline.from_pipe(pipe, dtype=torch.float32)
    assert back.engine_report().config == source.engine_report().config
    assert_same(generate(back, ""), generate(source, ""))


def test_another_engine_that_is_asked_for_wins():
    source = accelerate(toy.pipeline(), EngineConfig(modulation_table=False))
    asked = EngineConfig(reuse_text_projection=False)
    pipe = FastCogVideoXVideoToVideoPipeline.from_pipe(source, engine=asked, dtype=torch.float32)
    assert pipe.engine_report().config == asked
    assert accelerate(source).engine_report().config.tier == "exact"


def test_exact_from_quantized_is_refused_or_right():
    """Quantized weights do not come back: what says "exact" must not run on them in silence."""
    source = accelerate(toy.pipeline(), EngineConfig(recipe="int8"))
    try:
        pipe = FastCogVideoXVideoToVideoPipeline.from_pipe(source, engine="exact", dtype=torch.float32)
    except ValueError as error:
        assert "quantized" in str(error)
        return
    expected = generate(toy.pipeline(cls="CogVideoXVideoToVideoPipeline"), "VideoToVideo")
    assert_same(generate(pipe, "VideoToVideo"), expected)


def test_settings_of_the_source_are_kept():
    """What users switch on stays on: slicing, a cache."""
    from diffusers import FirstBlockCacheConfig

    source = accelerate(toy.pipeline())
    source.vae.enable_slicing()
    source.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.9))
    pipe = FastCogVideoXVideoToVideoPipeline.from_pipe(source, dtype=torch.float32)
    assert pipe.vae.use_slicing and pipe.transformer.is_cache_enabled
    reference = toy.pipeline(cls="CogVideoXVideoToVideoPipeline")
    reference.vae.enable_slicing()
    reference.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.9))
    assert_same(generate(pipe, "VideoToVideo"), generate(reference, "VideoToVideo"))


def test_parts_that_are_given_win():
    other = toy.transformer(seed=5)
    pipe = FastCogVideoXImageToVideoPipeline.from_pipe(
        accelerate(toy.pipeline("5b-i2v")), transformer=toy.transformer("5b-i2v", seed=5), dtype=torch.float32
    )
    reference = toy.pipeline("5b-i2v", seed=5)
    assert_same(latents(pipe, image=picture()), latents(reference, image=picture()))
    assert other is not pipe.transformer
