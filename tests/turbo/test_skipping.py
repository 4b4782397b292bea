"""Generations that follow a schedule: every output is checked against the formula, every step counted."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig
from PIL import Image

from cogvx_fast import EngineConfig, accelerate
from cogvx_fast.turbo import ScheduleError
from tests import toy

from .conftest import STEPS, STRIP, latents, recorded, schedule, schedule_file, timesteps_of

VARIANTS = list(toy.VARIANTS)
WEIGHTS = {2: (1.6, -0.7, 0.01), 4: (1.2, -0.1, -0.02), 5: (1.4, -0.5, 0.0), 7: (1.5, -0.4, 0.03)}


def arguments_of(variant):
    picture = torch.rand(1, 3, toy.SIZE, toy.SIZE, generator=torch.Generator().manual_seed(5)) * 2 - 1
    if variant.endswith("i2v"):
        return {"image": picture}
    if variant == "fun":
        return {"control_video": [Image.new("RGB", (toy.SIZE, toy.SIZE), "teal")] * toy.NUM_FRAMES, "num_frames": None}
    return {}


def by_formula(variant, strip, weights, scheduler_kind="ddim", **arguments):
    """Latents of diffusers' own pipeline whose transformer's output is replaced at the steps that are predicted."""
    pipe = toy.pipeline(variant, scheduler_kind=scheduler_kind)
    kept, step = [], iter(range(len(strip)))
    pipe.scheduler.set_timesteps(len(strip))
    alphas = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps].double().clamp(min=1e-8)
    places = (alphas / (1 - alphas)).log().tolist()
    inner = pipe.transformer.forward

    def forward(*args, **kwargs):
        number = next(step)
        if strip[number] == "#":
            output = inner(*args, **kwargs)[0]
            kept.insert(0, (number, output))
            return (output,)
        (newest, first), (other, second) = kept[:2]
        ahead = (places[number] - places[newest]) / (places[newest] - places[other])
        w1, w2, w3 = weights.get(number, (1 + ahead, -ahead, 0.0))
        return (w1 * first + w2 * second + w3 * kwargs["hidden_states"][:, :, :16],)

    pipe.transformer.forward = forward
    return latents(pipe, num_steps=len(strip), **arguments)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("weights", [{}, WEIGHTS], ids=["line", "fitted"])
def test_a_generation_is_what_the_formula_says(turbo, variant, weights):
    pipe = turbo(variant, weights=weights)
    asked = recorded(pipe)
    found = latents(pipe, **arguments_of(variant))
    expected = by_formula(variant, STRIP, weights, **arguments_of(variant))
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    computed = [t for t, mark in zip(timesteps_of(pipe, STEPS), STRIP, strict=True) if mark == "#"]
    assert asked.timesteps == computed
    line = pipe.engine_report().line("steps")
    assert line.applied and line.detail.startswith(f"{STRIP} 6 of 10 computed; calibrated, schedule.json")
    # Two outputs of both halves of guidance, in fp32.
    assert f"{2 * asked.outputs[0].nbytes / 1e6:.2f} MB kept" in line.detail


@pytest.mark.parametrize(
    "arguments",
    [
        {"guidance_scale": 1.0},
        {"use_dynamic_cfg": True},
        {"prompt": ["a cat", "a dog"]},
        {"eta": 0.4},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["ddim", "dpm"])
def test_it_is_right_for_every_scheduler_and_guidance(turbo, kind, arguments):
    found = latents(turbo(scheduler_kind=kind, weights=WEIGHTS), **arguments)
    expected = by_formula("2b", STRIP, WEIGHTS, kind, **arguments)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


def test_video_to_video_starts_where_it_does(tmp_path):
    video = torch.rand(toy.NUM_FRAMES, 3, toy.SIZE, toy.SIZE, generator=torch.Generator().manual_seed(5)) * 2 - 1
    reference = toy.pipeline(cls="CogVideoXVideoToVideoPipeline")
    strip = "##.###.#.#"
    path = schedule_file(reference, tmp_path / "s.json", schedule(reference, strip))
    pipe = accelerate(reference, EngineConfig("turbo", recipe="native", schedule=path, speed=10 / 7))
    asked = recorded(pipe)
    arguments = toy.inputs(STEPS, output_type="latent", video=list(video), strength=0.5)
    arguments.pop("num_frames")
    pipe(**arguments)
    timesteps = timesteps_of(reference, STEPS)
    # Of the last five steps: the second is predicted in the schedule, but there is one output before it alone.
    assert asked.timesteps == [timesteps[i] for i in (5, 6, 7, 9)]
    assert "the two outputs before it are not there" in pipe.engine_report().line("steps").detail


def test_another_number_of_steps_moves_the_schedule(turbo):
    pipe = turbo()
    asked = recorded(pipe)
    latents(pipe, num_steps=20)
    assert len(asked.timesteps) == 12
    assert (
        "moved from 10 steps to 20 by noise level; distance not measured" in pipe.engine_report().line("steps").detail
    )


def test_a_loop_of_ones_own_follows_it(turbo):
    pipe = turbo()
    asked = recorded(pipe)
    text = torch.randn(1, toy.TEXT_LENGTH, toy.TEXT_DIM, generator=torch.Generator().manual_seed(0))
    sample = torch.randn(1, 3, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    pipe.scheduler.set_timesteps(STEPS)
    with pipe.engine_session(), torch.no_grad():
        for timestep in pipe.scheduler.timesteps:
            output = pipe.transformer(
                hidden_states=sample, encoder_hidden_states=text, timestep=timestep.expand(1), return_dict=True
            ).sample
            sample = pipe.scheduler.step(output, timestep, sample, return_dict=False)[0]
    assert len(asked.timesteps) == STRIP.count("#")
    with pipe.engine_session(), torch.no_grad():  # timesteps that are not the scheduler's: all are computed
        for timestep in pipe.scheduler.timesteps.tolist():
            pipe.transformer(hidden_states=sample, encoder_hidden_states=text, timestep=torch.tensor([timestep]))
    assert "timesteps that are not the scheduler's" in pipe.engine_report().line("steps").detail


def change_latents(pipe, step, timestep, values):
    return {"latents": values["latents"] * 0.9} if step == 3 else values


def change_in_place(pipe, step, timestep, values):
    if step == 3:
        values["latents"].data.mul_(0.9)
    return {}


def change_weights(pipe, step, timestep, values):
    if step == 3:
        with torch.no_grad():
            pipe.transformer.transformer_blocks[1].ff.net[2].weight.mul_(1.1)
    return values


@pytest.mark.parametrize("callback", [change_latents, change_in_place, change_weights])
def test_after_a_change_in_a_callback_steps_are_computed_until_there_is_something_to_go_by(turbo, callback):
    pipe = turbo()
    asked = recorded(pipe)
    latents(pipe, callback_on_step_end=callback)
    timesteps = timesteps_of(pipe, STEPS)
    # "##.#..#.##": the line at 4 and 5 is through outputs of before the change, and both are computed.
    assert asked.timesteps == [timesteps[i] for i in (0, 1, 3, 4, 5, 6, 8, 9)]
    assert "something was changed" in pipe.engine_report().line("steps").detail


def test_an_adapter_that_is_set_anew_is_such_a_change(turbo):
    def weaker(pipe, step, timestep, values):
        if step == 3:
            pipe.set_adapters("style", 0.3)
        return values

    pipe = turbo()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    asked, timesteps = recorded(pipe), timesteps_of(pipe, STEPS)
    latents(pipe, callback_on_step_end=weaker)
    assert asked.timesteps == [timesteps[i] for i in (0, 1, 3, 4, 5, 6, 8, 9)]
    asked.timesteps.clear()
    latents(pipe, callback_on_step_end=lambda pipe, step, timestep, values: values)
    assert len(asked.timesteps) == STRIP.count("#")


def test_weights_that_are_brought_for_each_module_are_no_change(turbo):
    def look(pipe, step, timestep, values):
        return values

    expected, pipe = latents(turbo(weights=WEIGHTS)), turbo(weights=WEIGHTS)
    cpu_offload(pipe.transformer, execution_device="cpu")
    asked = recorded(pipe)
    torch.testing.assert_close(latents(pipe, callback_on_step_end=look), expected, rtol=1e-4, atol=1e-4)
    assert len(asked.timesteps) == STRIP.count("#")


@pytest.mark.parametrize("config", [{"compile": "blocks"}, {"memory_limit": "1GiB"}, {"vae_memory": "1GiB"}], ids=str)
def test_with_what_else_the_engine_can_do(turbo, config):
    pipe = turbo(weights=WEIGHTS, **config)
    torch.testing.assert_close(latents(pipe), latents(turbo(weights=WEIGHTS)), rtol=2e-4, atol=2e-4)
    assert pipe._ran.steps == STRIP.count("#")


def test_in_inference_mode_it_is_the_same(turbo):
    with torch.inference_mode():
        found = latents(turbo(weights=WEIGHTS))
    assert torch.equal(found, latents(turbo(weights=WEIGHTS)))


def test_threads_that_share_weights_do_not_see_each_others_outputs(turbo):
    first = turbo(weights=WEIGHTS)
    second = accelerate(first, first._config)
    second.scheduler = copy.deepcopy(first.scheduler)
    expected = latents(first), latents(first, prompt="a dog")
    with ThreadPoolExecutor(2) as pool:
        futures = pool.submit(latents, first), pool.submit(latents, second, prompt="a dog")
        for future, one in zip(futures, expected, strict=True):
            torch.testing.assert_close(future.result(), one, rtol=1e-4, atol=1e-4)


def test_a_callback_that_changes_nothing_changes_nothing(turbo):
    seen = []

    def look(pipe, step, timestep, values):
        seen.append((step, sorted(values)))
        return values

    pipe = turbo()
    names = ["latents", "prompt_embeds"]
    found = latents(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    assert torch.equal(found, latents(pipe))
    assert seen == [(step, names) for step in range(STEPS)]


def test_what_an_interrupted_generation_kept_is_gone(turbo):
    pipe = turbo()
    sessions = []

    def stop(pipe, step, timestep, values):
        from cogvx_fast.session import current

        sessions.append(current(pipe.transformer))
        pipe._interrupt = step == 4
        return values

    latents(pipe, callback_on_step_end=stop)
    assert sessions[0].skipping.done().strip == "##.#." and sessions[0].skipping.done().bytes_kept == 0
    assert torch.equal(latents(pipe), latents(turbo()))


def test_with_preview_the_picture_is_of_what_was_predicted(turbo):
    pictures = []

    def look(pipe, step, timestep, values):
        pictures.append(values["preview"])
        return values

    pipe = turbo()
    found = latents(pipe, callback_on_step_end=look, preview=True)
    assert torch.equal(found, latents(pipe)) and len(pictures) == STEPS


def test_one_that_was_compiled_whole_or_caches_by_itself_is_refused(turbo):
    from diffusers import FirstBlockCacheConfig

    pipe = turbo()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"tier 'turbo' cannot work: diffusers' cache is enabled.*disable_cache"):
        latents(pipe)
    pipe.transformer.disable_cache()
    latents(pipe)
    pipe.transformer = torch.compile(pipe.transformer)
    with pytest.raises(ValueError, match=r"the whole transformer is compiled.*EngineConfig\(compile='blocks'\)"):
        latents(pipe)


def test_another_scheduler_is_refused_before_any_work(turbo):
    pipe = turbo()
    asked = recorded(pipe)
    pipe.scheduler = toy.scheduler("dpm")
    with pytest.raises(ScheduleError, match=r"no schedule for this scheduler: it is of CogVideoXDDIMScheduler.*calibr"):
        latents(pipe)
    pipe.scheduler = toy.scheduler(snr_shift_scale=1.0)
    with pytest.raises(ScheduleError, match=r"snr_shift_scale=3\.0, the pipeline's has 1\.0"):
        latents(pipe)
    assert not asked.timesteps


def test_too_few_evaluations_are_refused_before_any_work(turbo):
    pipe = turbo()
    with pytest.raises(ScheduleError, match=r"num_inference_steps=3 leaves 2 evaluations"):
        latents(pipe, num_steps=3)


def test_gradients_are_those_of_a_computed_step(turbo):
    pipe = turbo()
    text = torch.randn(1, toy.TEXT_LENGTH, toy.TEXT_DIM)
    sample = torch.randn(1, 3, 16, 4, 4).requires_grad_()
    pipe.scheduler.set_timesteps(STEPS)
    with pipe.engine_session():
        for timestep in pipe.scheduler.timesteps[:3]:
            output = pipe.transformer(sample, text, timestep.expand(1))[0]
    assert torch.autograd.grad(output.sum(), sample)[0].abs().sum() > 0
