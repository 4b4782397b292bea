"""Which schedule a pipeline follows: that of a file, the one that comes with the package, or a published one."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..family import Variant
from . import published
from .files import ScheduleFile
from .identity import sampled_weights
from .schedule import ScheduleError, StepSchedule, evaluations_of, log_snr

SHIPPED = Path(__file__).parents[1] / "assets" / "schedules"
HOW = "`cogvx-fast calibrate MODEL --out schedule.json` finds one; pass it as EngineConfig(schedule='schedule.json')"


@dataclass(frozen=True)
class Source:
    """Where a pipeline's schedules come from.

    Attributes:
        files: one of which has the pipeline's scheduler; empty for a published rule.
        embeddings: of the transformer, for the published rule called `rule`.
    """

    files: tuple[ScheduleFile, ...] = ()
    rule: str = ""
    embeddings: published.TimeEmbeddings | None = None

    def schedule(
        self, scheduler: Any, speed: float | str, steps: int, timesteps: Sequence[int] | None = None
    ) -> StepSchedule:
        """The schedule of a generation.

        Args:
            scheduler: of the pipeline as it is now; it is not changed.
            timesteps: where the call brings its own.

        Raises:
            ScheduleError: for a scheduler that no schedule is of, and a speed that leaves too few evaluations.
        """
        of_call = _timesteps(scheduler, steps, timesteps)
        evaluations = evaluations_of(speed, len(of_call))
        if self.embeddings is not None:
            found = published.schedule(self.rule, self.embeddings, of_call, evaluations)
            return replace(found, places=log_snr(scheduler.alphas_cumprod, of_call))
        reasons = [file.identity.why_not_scheduler(scheduler) for file in self.files]
        if all(reasons):
            raise ScheduleError(f"there is no schedule for this scheduler: {reasons[0]}; {HOW}")
        file = self.files[reasons.index("")]
        found = file.for_evaluations(evaluations_of(speed, len(file.timesteps))).retargeted(of_call)
        return found if found.weights else replace(found, places=log_snr(scheduler.alphas_cumprod, of_call))


def choose_source(schedule: str | None, transformer: Any) -> Source:
    """Where the schedules of a pipeline with this transformer come from.

    Args:
        schedule: the file that the user named, or None.

    Raises:
        ScheduleError: for a file that is broken or of another checkpoint, and for a checkpoint without any.
    """
    weights = sampled_weights(transformer)
    found = why_not(schedule, transformer.config, weights)
    if found:
        raise ScheduleError(found)
    files = _fitting(schedule, transformer.config, weights)
    if files:
        return Source(files)
    rule = published.member(Variant.of(transformer.config)) or ""
    if next(transformer.time_embedding.parameters()).device.type == "meta":
        raise ScheduleError("the transformer's weights are elsewhere: make the pipeline fast before offloading is on")
    return Source(rule=rule, embeddings=published.TimeEmbeddings(transformer))


def why_not(schedule: str | None, config: Mapping[str, Any], weights: tuple[float, ...] = ()) -> str:
    """Why there is no schedule for a transformer with this configuration, in words; empty where there is one.

    Args:
        weights: some of it, see `identity.sampled_weights`; empty: not known yet.

    Raises:
        ScheduleError: for a file that is broken.
    """
    if schedule is not None:
        reason = ScheduleFile.read(schedule).identity.why_not_transformer(config, weights)
        return f"schedule {schedule!r} is not for this checkpoint: {reason}; {HOW}" if reason else ""
    if _fitting(None, config, weights) or published.member(Variant.of(config)):
        return ""
    return f"tier 'turbo' needs a schedule of the very checkpoint, and none comes with the package for this one; {HOW}"


def _fitting(schedule: str | None, config: Mapping[str, Any], weights: tuple[float, ...]) -> tuple[ScheduleFile, ...]:
    files = _shipped() if schedule is None else (ScheduleFile.read(schedule),)
    return tuple(file for file in files if not file.identity.why_not_transformer(config, weights))


@functools.cache
def _shipped() -> tuple[ScheduleFile, ...]:
    return tuple(ScheduleFile.read(path) for path in sorted(SHIPPED.glob("*.json")))


def _timesteps(scheduler: Any, steps: int, own: Sequence[int] | None) -> list[float]:
    """Of a generation; of a copy, as `set_timesteps` writes them on the scheduler."""
    if own is not None:
        return [float(t) for t in own]
    scheduler = copy.copy(scheduler)
    scheduler.set_timesteps(steps)
    # One that stands in for a generation that was parked gives the loop only what is left.
    return getattr(scheduler, "all_timesteps", scheduler.timesteps).tolist()
