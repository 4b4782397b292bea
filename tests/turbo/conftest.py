"""Toy pipelines that follow a schedule, and what their transformer was asked for."""

import dataclasses

import pytest
import torch

from cogvx_fast import EngineConfig, accelerate
from cogvx_fast.turbo import StepSchedule
from cogvx_fast.turbo.files import ScheduleFile
from cogvx_fast.turbo.identity import Identity
from tests import toy

STEPS = 10
STRIP = "##.#..#.##"


def timesteps_of(pipe, steps):
    pipe.scheduler.set_timesteps(steps)
    return tuple(map(float, pipe.scheduler.timesteps.tolist()))


def schedule(pipe, strip=STRIP, weights=None):
    return StepSchedule(strip, timesteps_of(pipe, len(strip)), weights or {})


def schedule_file(pipe, path, *schedules):
    found = {entry.evaluations: entry for entry in schedules or [schedule(pipe)]}
    ScheduleFile(Identity.of(pipe.transformer, pipe.scheduler), {"how": "made up"}, found).write(path)
    return path


@dataclasses.dataclass
class Asked:
    """The steps that the network computed, by timestep, with what went in and came out."""

    timesteps: list
    outputs: list


def recorded(pipe):
    """Computed steps of a pipeline, looked at from inside its forward pass."""
    asked, inner = Asked([], []), type(pipe.transformer)._computed

    def computed(model, session, *args, **kwargs):
        output = inner(model, session, *args, **kwargs)
        asked.timesteps.append(float(kwargs["timestep"][0]))
        asked.outputs.append(output[0].clone())
        return output

    pipe.transformer._computed = computed.__get__(pipe.transformer)
    return asked


@pytest.fixture
def turbo(tmp_path):
    """Makes a fast toy pipeline of a variant that follows a schedule."""

    def made(variant="2b", strip=STRIP, weights=None, scheduler_kind="ddim", **config):
        pipe = toy.pipeline(variant, scheduler_kind=scheduler_kind)
        path = schedule_file(pipe, tmp_path / "schedule.json", schedule(pipe, strip, weights))
        speed = len(strip) / strip.count("#")
        return accelerate(pipe, EngineConfig("turbo", recipe="native", schedule=path, speed=speed, **config))

    return made


def latents(pipe, **arguments):
    torch.manual_seed(0)
    inputs = toy.inputs(**{"num_steps": STEPS, "output_type": "latent", **arguments})
    return pipe(**{name: value for name, value in inputs.items() if value is not None}).frames
