"""Pictures of a generation's steps: the clean latents that a step of each pipeline predicts, and who sees them."""

import gc
import inspect
import math
import weakref

import accelerate as hf_accelerate
import pytest
import torch
from diffusers import FasterCacheConfig
from diffusers.callbacks import PipelineCallback

from cogvx_fast import FastCogVideoXPipeline, accelerate, session
from cogvx_fast.preview import LatentPreview
from tests import toy
from tests.dropin.generations import assert_same, frames, latents
from tests.dropin.test_offloading import is_away, model_poison  # noqa: F401 - a fixture
from tests.previews import EXTRA, fits, generate, made  # noqa: F401 - a fixture


@pytest.fixture
def clean(monkeypatch):
    """The latents that pictures were made of."""
    found, of = [], LatentPreview.frames

    def record(self, latents):
        found.append(latents)
        return of(self, latents)

    monkeypatch.setattr(LatentPreview, "frames", record)
    return found


@pytest.fixture
def steps(monkeypatch):
    """What the schedulers themselves predict in each step."""

    def listen(pipe):
        found, step = [], type(pipe.scheduler).step

        def recorded(*args, **kwargs):
            result = step(*args, **kwargs)
            found.append(result[1])
            return result

        monkeypatch.setattr(type(pipe.scheduler), "step", recorded)
        return found

    return listen


@pytest.mark.parametrize("kind", ["ddim", "dpm"])
@pytest.mark.parametrize("guidance", ["none", "constant", "dynamic"])
def test_the_clean_latents_follow_from_the_step(kind, guidance, clean):
    pipe, taken, expected = made(scheduler_kind=kind), [], []
    weight = 1.0 if guidance == "none" else 5.0
    pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: taken.append((kwargs["hidden_states"], output[0])), with_kwargs=True
    )

    def callback(pipe, step, timestep, tensors):
        noisy, v = taken[-1]
        t, w = timestep.item(), weight
        if guidance == "dynamic":
            w = 1 + 5.0 * (1 - math.cos(math.pi * ((4 - t) / 4) ** 5.0)) / 2
        if guidance != "none":
            (noisy, _), (unconditional, conditional) = noisy.chunk(2), v.chunk(2)
            v = (1 - w) * unconditional + w * conditional
        a = pipe.scheduler.alphas_cumprod[t].item()
        expected.append(math.sqrt(a) * noisy - math.sqrt(1 - a) * v)
        return {}

    options = {"use_dynamic_cfg": True} if guidance == "dynamic" else {}
    final, _ = generate(
        pipe, callback=callback, num_steps=4, guidance_scale=weight, prompt=["a cat", "dogs"], **options
    )
    assert len(clean) == 4 and clean[0].shape == (2, 3, 16, 4, 4)
    for given, wanted in zip(clean, expected, strict=True):
        assert_same(given, wanted)
    if kind == "ddim":  # of which the last step ends at its prediction
        assert_same(final, clean[-1])


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_every_prediction_type(prediction, clean, steps):
    pipe = made()
    # Without a last noise level of no signal, from which "epsilon" could tell nothing.
    pipe.scheduler = type(pipe.scheduler).from_config(
        pipe.scheduler.config, prediction_type=prediction, rescale_betas_zero_snr=False
    )
    predicted = steps(pipe)
    generate(pipe)
    for given, wanted in zip(clean, predicted, strict=True):
        assert_same(given, wanted)


def louder(pipe, step, timestep, tensors):
    return {"latents": tensors["latents"] * 1.2}


@pytest.mark.parametrize("callback", [None, louder])
@pytest.mark.parametrize("variant", EXTRA)
def test_every_pipeline_shows_what_its_scheduler_predicts(variant, callback, clean, steps):
    pipe = made(variant)
    predicted = steps(pipe)
    _, pictures = generate(pipe, variant, callback)
    assert len(pictures) == len(predicted) == len(clean) > 1
    for given, wanted in zip(clean, predicted, strict=True):
        assert_same(given, wanted[:, wanted.shape[1] - 3 :])  # 1.5 has a latent frame of padding in front
    assert pictures[0].shape == (1, 3, 4, 4, 3) and pictures[0].dtype == torch.uint8
    assert torch.equal(pictures[-1], pipe.preview(clean[-1]))


def test_what_stands_around_the_transformers_forward_counts(clean, steps):
    pipe = made()
    predicted, forward = steps(pipe), pipe.transformer.forward
    pipe.transformer.forward = lambda *args, **kwargs: (forward(*args, **kwargs)[0] * 1.5,)
    generate(pipe)
    for given, wanted in zip(clean, predicted, strict=True):
        assert_same(given, wanted)


def test_with_a_cache_that_leaves_halves_out(clean, steps):
    """FasterCache computes the conditional half alone in some steps and completes the output around `forward`."""
    pipe, batches = made(), []
    pipe.transformer.enable_cache(
        FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 901),
            unconditional_batch_skip_range=2,
            unconditional_batch_timestep_skip_range=(-1, 901),
            attention_weight_callback=lambda _: 0.3,
            current_timestep_callback=lambda: pipe.current_timestep,
            tensor_format="BFCHW",
        )
    )
    pipe.transformer.patch_embed.register_forward_hook(lambda module, args, output: batches.append(len(output)))
    predicted = steps(pipe)
    generate(pipe, num_steps=8)
    assert set(batches) == {1, 2}
    for given, wanted in zip(clean, predicted, strict=True):
        assert_same(given, wanted)


def test_a_step_without_the_transformer_has_no_picture():
    pipe = made()

    def callback(pipe, step, timestep, tensors):
        pipe.transformer = toy.transformer()
        return {}

    with pytest.raises(ValueError, match="did not call its transformer in step 1"):
        generate(pipe, callback=callback)


@pytest.mark.parametrize("variant", ["2b", "5b-i2v"])
def test_a_generation_is_the_same_with_pictures(variant):
    assert_same(generate(made(variant), variant)[0], latents(toy.pipeline(variant), **EXTRA[variant]), 1e-4)


@pytest.mark.slow
def test_with_model_offloading(model_poison):  # noqa: F811
    expected = frames(toy.pipeline())
    pipe, away = made(vae="new"), []
    pipe.enable_model_cpu_offload(device="cpu")

    def callback(pipe, step, timestep, tensors):
        away.append(is_away(pipe.vae) and not is_away(pipe.transformer))
        return {}

    for _ in range(2):
        output, pictures = generate(pipe, callback=callback, output_type="pt")
        assert_same(torch.as_tensor(output), expected)
        assert len(pictures) == 3
    assert away == [True] * 6, "the autoencoder does not lie beside the transformer"
    assert is_away(pipe.transformer)


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["sequential", "leaves"])
def test_with_other_offloading(offload, fits):  # noqa: F811
    pipe = made(vae="new")
    _, expected = generate(made())  # of which the map may be there already
    fits.clear()
    cpu = torch.device("cpu")
    if offload == "leaves":
        pipe.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    else:
        for model in (pipe.text_encoder, pipe.transformer, pipe.vae):
            hf_accelerate.cpu_offload(model, cpu, offload_buffers=bool(model._parameters))
        assert pipe.vae.decoder.conv_in.conv.weight.is_meta
    for _ in range(2):
        for given, wanted in zip(generate(pipe)[1], expected, strict=True):
            assert torch.equal(given, wanted)
    assert len(fits) == 1, "once, wherever the weights lie"


# What a call leaves, takes and refuses.


@pytest.mark.parametrize("end", ["interrupt", "error", "whole"])
def test_nothing_of_a_generation_is_left(end):
    pipe = made()
    generate(pipe, callback=lambda pipe, *_: {})
    parts = pipe, pipe.transformer, pipe.vae, pipe.scheduler
    before, taken = [set(vars(part)) for part in parts], []
    sessions = []

    def callback(pipe, step, timestep, tensors):
        running = session.current(pipe.transformer)
        sessions.append(weakref.ref(running))
        taken.append(weakref.ref(tensors["preview"]))
        assert running.on_step is not None
        pipe._interrupt = end == "interrupt"
        if end == "error":
            raise InterruptedError
        return {}

    listener = pipe.transformer.register_forward_hook(lambda _, args, output: taken.append(weakref.ref(output[0])))
    try:
        generate(pipe, callback=callback, num_steps=5)
    except InterruptedError:
        assert end == "error"
    listener.remove()
    assert len(sessions) == (5 if end == "whole" else 1), "an early exit"
    gc.collect()
    assert [part() for part in (*taken, *sessions)] == [None] * (len(taken) + len(sessions))
    assert [set(vars(part)) for part in parts] == before
    assert not pipe.transformer._forward_hooks and session.current(pipe.transformer) is None
    assert_same(latents(pipe), latents(toy.pipeline()))


def test_what_is_not_asked_for_is_not_made(fits):  # noqa: F811
    pipe, seen = made(vae="new"), []

    def callback(pipe, step, timestep, tensors):
        seen.append((set(tensors), session.current(pipe.transformer).on_step))
        return tensors

    latents(pipe, callback_on_step_end=callback, preview=False)
    assert seen == [({"latents"}, None)] * 3 and not fits
    assert "preview" not in pipe.stage_seconds


class Official(PipelineCallback):
    """A callback of diffusers' own kind, which names the tensors that it wants."""

    tensor_inputs = ["prompt_embeds"]  # noqa: RUF012 - as upstream has it

    def __init__(self):
        super().__init__(cutoff_step_ratio=None, cutoff_step_index=1)
        self.seen = []

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        self.seen.append(set(callback_kwargs))
        return callback_kwargs


def test_callbacks_of_diffusers_own_kind():
    official = Official()
    latents(made(), callback_on_step_end=official, preview=True)
    assert official.seen == [{"prompt_embeds", "preview"}] * 3


def test_a_callback_given_by_position():
    pipe, seen = made(), []
    inputs = toy.inputs(output_type="latent")
    names = list(inspect.signature(toy.pipeline().__call__).parameters)
    names = names[: names.index("callback_on_step_end")]
    defaults = inspect.signature(pipe.__call__).parameters
    args = [inputs.pop(name, defaults[name].default) for name in names]
    pipe(*args, lambda pipe, step, timestep, tensors: seen.append(set(tensors)) or {}, preview=True, **inputs)
    assert seen == [{"latents", "preview"}] * 3


def test_a_pipeline_with_a_preview_of_its_own_keeps_it():
    from diffusers import CogVideoXPipeline

    class Other(CogVideoXPipeline):
        def __call__(self, prompt, preview="none"):
            return preview

    pipe = accelerate(toy.pipeline(cls=Other))
    assert pipe("a cat", preview="theirs") == "theirs"
    assert list(inspect.signature(pipe.__call__).parameters) == ["prompt", "preview"]


def test_help_says_what_the_keyword_does():
    assert "callback_kwargs" in inspect.getdoc(FastCogVideoXPipeline.__call__).split("preview (`bool`")[1]


def test_calls_that_give_no_pictures_are_refused(fits):  # noqa: F811
    pipe = made()
    with pytest.raises(ValueError, match="callback_on_step_end"):
        latents(pipe, preview=True)
    with pytest.raises(TypeError, match="preview='yes' must be True or False"):
        latents(pipe, preview="yes", callback_on_step_end=louder)
    with pytest.raises(ValueError, match="16 channels"):
        pipe.preview(torch.zeros(1, 16, 3, 4, 4))
    with pytest.raises(TypeError, match="tensor"):
        pipe.preview([1])
    pipe.scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="prediction_type='flow'"):
        latents(pipe, preview=True, callback_on_step_end=louder)
    pipe = made()
    pipe.transformer = torch.compile(pipe.transformer)
    with pytest.raises(ValueError, match="EngineConfig"):
        latents(pipe, preview=True, callback_on_step_end=louder)
    pipe.vae = None
    with pytest.raises(ValueError, match="vae is None"):
        latents(pipe, preview=True, callback_on_step_end=louder)
    with pytest.raises(ValueError, match="vae is None"):
        pipe.preview(torch.zeros(1, 3, 16, 4, 4))
    assert not fits
