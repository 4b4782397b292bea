"""The engine's own: schedules that a calibration found, followed by `engine="turbo"`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from cogvx_fast import EngineConfig, accelerate
from cogvx_fast.turbo import ScheduleError, choose_source

from .counting import Calls
from .method import FAST, Job, Method, Prepared, Unreachable


def engine(job: Job) -> EngineConfig:
    """The configuration whose schedule has exactly the job's evaluations."""
    return EngineConfig("turbo", recipe="native", speed=job.steps / job.evaluations, schedule=job.schedule)


def _find(pipe: Any, job: Job) -> dict[str, Any]:
    config = engine(job)
    try:
        found = choose_source(config.schedule_path, pipe.transformer)
        schedule = found.schedule(pipe.scheduler, config.speed, job.steps)
    except ScheduleError as error:
        raise Unreachable(str(error)) from None
    if schedule.evaluations != job.evaluations:
        raise Unreachable(f"the nearest schedule there is has {schedule.evaluations} evaluations")
    return {"strip": schedule.strip, "source": schedule.source}


@contextlib.contextmanager
def _apply(pipe: Any, job: Job, parameters: dict[str, Any]) -> Iterator[Prepared]:
    yield Prepared(accelerate(pipe, engine(job)), {"num_inference_steps": job.steps})


@contextlib.contextmanager
def _computed_steps(pipe: Any) -> Iterator[Calls]:
    """Counts what the transformer computes, inside its forward pass, where steps are left out."""
    calls, inner = Calls(), pipe.transformer._computed

    def computed(*args: Any, **kwargs: Any) -> Any:
        calls.evaluations += 1
        return inner(*args, **kwargs)

    pipe.transformer._computed = computed
    try:
        yield calls
    finally:
        del pipe.transformer._computed


TURBO = Method(
    "turbo", "engine='turbo', recipe='native': calibrated schedule", FAST, _find, _apply, _computed_steps, engine
)
