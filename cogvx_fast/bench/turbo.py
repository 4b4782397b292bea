"""Contenders that leave steps out: what engine "turbo" gains in time. What it costs: `benchmarks/quality`."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

from ..config import EngineConfig
from ..turbo.choice import SHIPPED
from ..turbo.files import ScheduleFile
from ..turbo.identity import Identity
from .contenders import Contender, Prepared, ours
from .engine import as_plain
from .reference import Pipeline
from .workloads import DEMO, Workload

STEPS = 50
EVALUATIONS = (25, 17)
STAGES = ("denoise", "generation")


def turbo(pipe: Pipeline, workload: Workload, stage: str, evaluations: int, recipe: str) -> Prepared:
    """The engine with the demo checkpoint's schedule; of random weights, too, where only the time says something."""
    config: dict[str, Any] = {"tier": "turbo", "recipe": recipe, "speed": STEPS / evaluations}
    if workload.checkpoint == DEMO:
        prepared = ours(pipe, workload, stage, EngineConfig(**config))
    else:
        borrowed = dataclasses.replace(
            ScheduleFile.read(SHIPPED / "demo.json"), identity=Identity.of(pipe.transformer, pipe.scheduler)
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "schedule.json"
            borrowed.write(path)
            prepared = ours(pipe, workload, stage, EngineConfig(**config, schedule=str(path)))
        stated = as_plain(EngineConfig(**config, schedule="the demo's"))  # not a name that is gone
        note = "the demo's schedule, of which only the time says something here"
        prepared = dataclasses.replace(prepared, engine=stated, note=note)
    return dataclasses.replace(prepared, extras={"evaluations": evaluations, "ideal_gain": STEPS / evaluations})


def _contender(evaluations: int, recipe: str, what: str) -> Contender:
    return Contender(
        functools.partial(turbo, evaluations=evaluations, recipe=recipe),
        f'cogvx_fast, engine="turbo" on {what}: {evaluations} of {STEPS} steps computed',
        stages=STAGES,
        lossy="steps are left out",
    )


def _balanced(pipe: Pipeline, workload: Workload, stage: str) -> Prepared:
    return ours(pipe, workload, stage, EngineConfig("balanced"))


TURBO: dict[str, Contender] = {
    **{f"ours-turbo-{number}": _contender(number, "native", "exact") for number in EVALUATIONS},
    "ours-balanced": Contender(
        _balanced, 'cogvx_fast, engine="balanced"', stages=STAGES, lossy="products are in 8 bits"
    ),
    "ours-balanced-turbo-17": _contender(17, "balanced", "balanced"),
}
