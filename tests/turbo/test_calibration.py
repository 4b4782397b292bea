"""Calibration: formulas against those written out here, the search against all schedules there are, a whole run."""

import itertools
import math

import numpy as np
import pytest
import torch

from cogvx_fast import EngineConfig, accelerate
from cogvx_fast.turbo.calibration import CalibrationError, Plan, calibrate, recording, search
from cogvx_fast.turbo.calibration.calibrate import POWERS, _chosen_power
from tests import toy

from .conftest import recorded

SIZE = {"height": toy.SIZE, "width": toy.SIZE, "num_frames": toy.NUM_FRAMES, "max_sequence_length": toy.TEXT_LENGTH}


def plan(prompts=3, checks=1, **more):
    calls = [{"prompt": f"a cat {'x' * number}", "seed": number, **SIZE} for number in range(prompts + checks)]
    return Plan(calls[:prompts], calls[prompts:], **{"steps": 10, **more})


@pytest.mark.parametrize("kind", ["ddim"])
def test_a_step_takes_as_much_of_an_error_as_the_scheduler_does(kind):
    scheduler = toy.scheduler(kind)
    scheduler.set_timesteps(10)
    timesteps = scheduler.timesteps.tolist()
    sizes = recording.step_sizes(scheduler.alphas_cumprod, timesteps)
    generator = torch.Generator().manual_seed(0)
    sample, output, error = (torch.randn(1, 2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    for step, timestep in enumerate(timesteps):
        moved = [scheduler.step(v, timestep, sample, return_dict=False)[0] for v in (output, output + error)]
        torch.testing.assert_close(moved[1] - moved[0], sizes[step] * error, rtol=1e-4, atol=1e-5)


def vectors(steps, dim=40, seed=0):
    """Outputs and latents of a made-up generation that moves smoothly."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2 * steps, dim)).cumsum(0) * 0.1 + rng.standard_normal(dim)


def test_the_error_of_a_line_is_that_of_the_vectors():
    rows, sizes = vectors(8), np.linspace(-0.2, -0.5, 8)
    total = sum(sizes[j] * (rows[j] - (rows[3] + (rows[3] - rows[2]) * (j - 3))) for j in (4, 5))
    assert recording.error_of_line(rows @ rows.T, sizes, 3, 2) == pytest.approx(np.linalg.norm(total))
    outputs = [torch.tensor(row) for row in rows[:8]]
    known = recording.disturbed(outputs, 3, 2)
    assert len(known) == 6 and torch.allclose(known[5], outputs[3] * 3 - outputs[2] * 2, atol=1e-5)


def by_definition(rows, factors, computed):
    """The squared error of a set of computed steps: spans as vectors, by least squares done by numpy's own."""
    steps, total = len(factors), 0.0
    for position, newest in enumerate(computed[1:], start=1):
        end = computed[position + 1] if position + 1 < len(computed) else steps
        span = np.zeros(rows.shape[1])
        for step in range(newest + 1, end):
            basis = np.stack([rows[newest], rows[computed[position - 1]], rows[steps + step]], axis=1)
            weights = np.linalg.lstsq(basis, rows[step], rcond=None)[0]
            span += factors[step] * (rows[step] - basis @ weights)
        total += span @ span
    return total


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_search_finds_the_best_of_all_schedules(seed, monkeypatch):
    monkeypatch.setattr(search, "RIDGE", 1e-14)
    steps, rows = 9, vectors(9, seed=seed)
    sizes, gains = np.linspace(-0.1, -0.4, steps), np.linspace(0.2, 1.0, steps)
    found = search.best_schedules(rows @ rows.T, sizes, gains, range(steps, 0, -1))
    for number in range(2, steps + 1):
        errors = {
            (0, 1, *others): by_definition(rows, sizes * gains, (0, 1, *others))
            for others in itertools.combinations(range(2, steps), number - 2)
        }
        computed = tuple(i for i in range(steps) if found[number].is_computed(i))
        assert len(computed) == number
        assert errors[computed] == pytest.approx(min(errors.values()), rel=1e-6, abs=1e-9)


def test_weights_are_least_squares_over_outputs_and_latents():
    rows, steps = vectors(9), 9
    found = search.best_schedules(rows @ rows.T, np.ones(steps), np.ones(steps), range(steps, 0, -1))[4]
    for step, weights in found.weights.items():
        newest, other = found.before(step)
        basis = np.stack([rows[newest], rows[other], rows[steps + step]], axis=1)
        assert weights == pytest.approx(np.linalg.lstsq(basis, rows[step], rcond=None)[0], abs=2e-3)


@pytest.mark.parametrize(
    ("errors", "power"),
    [((1.0, 1.0, 1.0), 0.0), ((1.2, 1.0, 1.1), 0.0), ((1.3, 1.2, 1.0), 0.5), ((1.3, 1.3, 1.0), 1.0)],
)
def test_gains_count_no_more_than_the_trial_shows(errors, power):
    assert _chosen_power(np.array(errors)) == power


def test_gains_matter_to_what_is_found():
    rows, steps = vectors(12), 12
    late = search.best_schedules(rows @ rows.T, np.ones(steps), np.geomspace(0.01, 1, steps), range(steps, 0, -1))[6]
    early = search.best_schedules(rows @ rows.T, np.ones(steps), np.geomspace(1, 0.01, steps), range(steps, 0, -1))[6]
    assert late.strip[:6].count("#") < early.strip[:6].count("#")


def test_products_are_of_guided_predictions_and_latents():
    made = recording.Recording(None, guidance=3.0)
    generator = torch.Generator().manual_seed(0)
    guided, entering = [], []
    for step in range(3):
        latents, output = (torch.randn(4, 2, 16, 3, 3, generator=generator) for _ in range(2))
        assert made.predicted(step, latents) is None
        made.computed(step, output)
        guided.append((output[:2] + 3 * (output[2:] - output[:2])).flatten())
        entering.append(latents[:2].flatten())
    rows = torch.stack([*guided, *entering]).double()
    expected = rows @ rows.T / rows[:3].square().sum(dim=1).mean()
    np.testing.assert_allclose(made.products(), expected.numpy(), rtol=1e-5, atol=1e-6)


def test_long_clips_are_compared_by_a_sample(monkeypatch):
    monkeypatch.setattr(recording, "SAMPLED", 100)
    made = recording.Recording(None, guidance=1.0)
    latents = torch.arange(2 * 16 * 9.0).reshape(1, 2, 16, 3, 3)
    made.predicted(0, latents)
    made.computed(0, latents)
    assert len(made.guided[0]) == 100 and torch.equal(made.guided[0], made.latents[0])


def test_a_whole_calibration_makes_the_evaluations_that_it_says_and_resumes(tmp_path):
    pipe = accelerate(toy.pipeline())
    asked, told, wanted = recorded(pipe), [], plan(disturbed=1, tried=2)
    found = calibrate(pipe, wanted, tmp_path / "parts", told.append)
    # Schedules that are the same for several powers of the gains are tried once.
    spared = 2 * (len(POWERS) - 1) * sum(wanted.checked)
    assert wanted.evaluations - spared <= len(asked.timesteps) <= wanted.evaluations == sum(told)
    assert {len(s.strip) for s in found.schedules.values()} == {10}
    assert all(found.schedules[number].evaluations == number for number in found.schedules)
    for number in wanted.checked:
        assert found.schedules[number].distance.clips == 1
        assert math.isfinite(found.schedules[number].distance.psnr_db)
    assert found.schedules[9].distance is None
    assert found.found["prompts"] == 3 and found.found["dtype"] == "float32"
    # All is there: nothing is made again.
    before = len(asked.timesteps)
    again = calibrate(pipe, wanted, tmp_path / "parts", told.append)
    assert len(asked.timesteps) == before and again == found
    # What was stopped in the middle goes on with what is missing.
    (tmp_path / "parts" / "checked-0.json").unlink()
    assert calibrate(pipe, wanted, tmp_path / "parts") == found
    assert len(asked.timesteps) == before + 10 + sum(wanted.checked)
    # What was found is followed: the pipeline itself is as it was.
    found.write(tmp_path / "s.json")
    turbo = accelerate(pipe, EngineConfig("turbo", recipe="native", schedule=tmp_path / "s.json", speed=2))
    del pipe.transformer._computed
    asked = recorded(turbo)
    turbo(**toy.inputs(10, output_type="latent"))
    assert len(asked.timesteps) == 5


def test_a_pipeline_that_is_shown_a_picture_is_calibrated_from_python(tmp_path):
    picture = torch.rand(1, 3, toy.SIZE, toy.SIZE, generator=torch.Generator().manual_seed(5)) * 2 - 1
    made = plan(2, 1)
    with_picture = Plan(
        *([{**call, "image": picture} for call in calls] for calls in (made.calls, made.checks)), steps=10
    )
    found = calibrate(accelerate(toy.pipeline("5b-i2v", scheduler_kind="dpm")), with_picture, tmp_path / "parts")
    assert found.schedules[5].distance.clips == 1 and found.identity.transformer["in_channels"] == 32


def test_a_black_video_teaches_nothing(tmp_path):
    pipe = accelerate(toy.pipeline())
    with torch.no_grad():
        pipe.vae.decoder.conv_out.conv.weight.zero_()
    with pytest.raises(CalibrationError, match="the video of 'a cat ' is of one colour"):
        calibrate(pipe, plan(), tmp_path / "parts")


def test_a_video_that_is_not_finite_is_named(tmp_path):
    pipe = accelerate(toy.pipeline())
    with torch.no_grad():
        pipe.vae.decoder.conv_out.conv.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="finite"):
        calibrate(pipe, plan(), tmp_path / "parts")
