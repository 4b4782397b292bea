"""Schedules as data: what they say, what is refused, and how they move to other steps."""

import json
import math

import pytest
import torch

from cogvx_fast.turbo import Distance, ScheduleError, StepSchedule
from cogvx_fast.turbo.files import ScheduleFile
from cogvx_fast.turbo.schedule import evaluations_of, line, log_snr
from tests import toy

from .conftest import schedule, schedule_file, timesteps_of

FIFTY = tuple(float(t) for t in range(999, -1, -20))


def of(strip, **more):
    return StepSchedule(strip, FIFTY[: len(strip)], **more)


def test_what_a_schedule_says():
    made = of("##.#..#", weights={4: (2.0, -1.0, 0.5)})
    assert (made.steps, made.evaluations) == (7, 4)
    assert [made.is_computed(step) for step in range(3)] == [True, True, False]
    assert made.before(2) == (1, 0) and made.before(5) == (3, 1) and made.before(6) == (3, 1)
    assert made.weights_at(4, (3, 1)) == (2.0, -1.0, 0.5)
    # Another two outputs than it was found with: the line through them, 4 = 1 + 3 (1 - 0).
    assert made.weights_at(4, (1, 0)) == (4.0, -3.0, 0.0)
    assert made.weights_at(2, (1, 0)) == (2.0, -1.0, 0.0)


def test_a_line_goes_through_both_outputs_and_on():
    for step in (5, 6, 9):
        newest, other = line(step, (4, 1))
        assert newest * (3 * 4 + 7) + other * (3 * 1 + 7) == pytest.approx(3 * step + 7)
    assert line(6, (4,)) == (1.0,)


def test_a_line_may_be_straight_in_something_else():
    places = (-9.0, -4.0, -3.5, 0.0, 2.0)
    newest, other = line(4, (3, 1), places)
    assert newest * (3 * places[3] + 7) + other * (3 * places[1] + 7) == pytest.approx(3 * places[4] + 7)
    assert line(2, (1, 0), (-9.0, -9.0, -8.0)) == (1.0, 0.0)
    alphas = torch.linspace(1, 0, 1000)
    found = log_snr(alphas, [999, 750, 0])
    assert found[1] == pytest.approx(math.log(float(alphas[750] / (1 - alphas[750]))), rel=1e-4)
    assert found[0] == pytest.approx(math.log(1e-8), rel=1e-3) and found[2] == pytest.approx(-math.log(1e-8), rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strip": "##x#"}, r"strip '##x#' must be of '#' and '\.'"),
        ({"strip": "#.##"}, r"must start with '##': there is no output before"),
        ({"strip": ""}, "must start with"),
        ({"weights": {3: (1.0, 0.0, 0.0)}}, "weights of step 3, which is not predicted"),
        ({"weights": {9: (1.0, 0.0, 0.0)}}, "weights of step 9"),
        ({"weights": {2: (1.0, 0.0)}}, "must be 3 finite numbers"),
        ({"weights": {2: (1.0, float("nan"), 0.0)}}, "must be 3 finite numbers"),
        ({"timesteps": (3.0, 2.0, 1.0)}, "must be as many, and fall"),
        ({"timesteps": (4.0, 3.0, 3.0, 1.0)}, "must be as many, and fall"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ScheduleError, match=message):
        StepSchedule(**{"strip": "##.#", "timesteps": (4.0, 3.0, 2.0, 1.0), **arguments})


@pytest.mark.parametrize("steps", [8, 20, 33, 49, 51, 100])
def test_for_other_steps_it_is_as_dense_at_every_noise_level(steps):
    found = of("##" + "#." * 10 + "..#" * 8 + "####", source="somewhere")
    timesteps = [999 - 1000 * i / steps for i in range(steps)]
    moved = found.retargeted(timesteps)
    assert moved.steps == steps and moved.timesteps == tuple(timesteps)
    assert moved.evaluations == max(4, round(found.evaluations * steps / 50))
    assert moved.weights == {} and moved.distance is None
    assert moved.source == f"somewhere, moved from 50 steps to {steps} by noise level"
    if steps >= 20:
        for level in (800, 600, 400, 200):
            share = [
                sum(s.is_computed(i) and s.timesteps[i] >= level for i in range(s.steps)) / s.evaluations
                for s in (found, moved)
            ]
            assert share[0] == pytest.approx(share[1], abs=1.5 / moved.evaluations)


def test_for_its_own_steps_it_stays():
    found = of("##.#..#", weights={4: (2.0, -1.0, 0.5)})
    assert found.retargeted(list(found.timesteps)) is found


def test_evaluations_by_speed():
    assert [evaluations_of(speed, 50) for speed in ("quality", "fast", 2, 2.5, 1, 12.5)] == [25, 17, 25, 20, 50, 4]
    with pytest.raises(ScheduleError, match=r"speed=20 of num_inference_steps=50 leaves 3 .* speed at most 12.5"):
        evaluations_of(20, 50)
    with pytest.raises(ScheduleError, match="num_inference_steps=4 leaves 2"):
        evaluations_of("quality", 4)


def test_a_file_gives_back_what_was_written(tmp_path):
    pipe = toy.pipeline()
    weights = {2: (1.5, -0.5, 0.001)}
    first = schedule(pipe, "##.#..#.##", weights)
    path = schedule_file(pipe, tmp_path / "s.json", first, schedule(pipe, "####..#.##"))
    read = ScheduleFile.read(path)
    assert read.schedules[6].strip == first.strip and read.schedules[6].weights == weights
    assert read.timesteps == timesteps_of(pipe, 10)
    assert [read.for_evaluations(number).evaluations for number in (4, 6, 7, 9)] == [6, 6, 7, 7]
    assert read.schedules[6].source == "calibrated, s.json"
    assert not read.identity.why_not_transformer(pipe.transformer.config, read.identity.weights)
    assert "##.#..#.##" in path.read_text()


def test_a_distance_is_kept(tmp_path):
    pipe = toy.pipeline()
    made = StepSchedule("##.#", timesteps_of(pipe, 4), distance=Distance(41.25, 39.5, 8))
    read = ScheduleFile.read(schedule_file(pipe, tmp_path / "s.json", made))
    assert str(read.schedules[3].distance) == "41.2 dB (worst 39.5) over 8 clips"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("format"), "its format is not"),
        (lambda c: c.update(format=3), "its format is not"),
        (lambda c: c.pop("identity"), "KeyError: 'identity'"),
        (lambda c: c["identity"].pop("scheduler"), "scheduler"),
        (lambda c: c["identity"].update(weights="many"), "could not convert"),
        (lambda c: c.update(schedules=[]), "it holds no schedule"),
        (lambda c: c.update(schedules={}), "it holds no schedule"),
        (lambda c: c["schedules"][0].update(evaluations=5), "has not 5 evaluations"),
        (lambda c: c["schedules"][0].update(strip="##.#"), "must be as many"),
        (lambda c: c["schedules"][0].update(weights={"x": [1, 2, 3]}), "invalid literal"),
        (lambda c: c["schedules"][0].update(weights={"2": None}), "NoneType"),
        (lambda c: c["schedules"][0].update(distance={"psnr_db": 1}), "missing"),
        (lambda c: c.update(timesteps=[1] * 10), "and fall"),
    ],
)
def test_a_broken_file_is_named_with_the_reason(tmp_path, change, message):
    path = schedule_file(toy.pipeline(), tmp_path / "s.json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ScheduleError, match=rf"schedule '.*s\.json' is broken \(.*{message}.*calibrate"):
        ScheduleFile.read(path)


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b"nan"])
def test_what_is_no_json_of_ours_is_refused(tmp_path, data):
    (tmp_path / "s.json").write_bytes(data)
    with pytest.raises(ScheduleError, match="is broken"):
        ScheduleFile.read(tmp_path / "s.json")


@pytest.mark.parametrize("name", ["none.json", "", "\0", "x" * 300])
def test_what_is_not_there_is_named(tmp_path, name):
    with pytest.raises(ScheduleError, match="cannot be read"):
        ScheduleFile.read(f"{tmp_path}/{name}")
