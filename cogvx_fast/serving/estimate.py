"""How long a video will take, learned from those that were made."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .jobs import Job

REMEMBERED = 200  # jobs
_UNKNOWN_STEP, _UNKNOWN_REST = 1.0, 1.0  # seconds, before a worker is warm


@dataclass(frozen=True)
class Size:
    """What the time of a video depends on: numbers of one clip, and whether guidance doubles its batch."""

    width: int
    height: int
    num_frames: int
    guided: bool

    @classmethod
    def of(cls, request: Mapping[str, Any]) -> Size:
        return cls(request["width"], request["height"], request["num_frames"], request["guidance_scale"] > 1)

    @property
    def work(self) -> float:
        """The work of a step, relative to others', by size alone: how attention grows depends on the model."""
        return self.width * self.height * self.num_frames * (2.0 if self.guided else 1.0)


class Estimator:
    """Medians of seconds a step, and of the rest (text, decoding, writing), by size.

    Sizes that were never made take the nearest one's, in proportion to their pixels and frames.
    """

    def __init__(self) -> None:
        self._steps: dict[Size, float] = {}
        self._rests: dict[Size, float] = {}

    @property
    def knows(self) -> bool:
        """Whether it learned from anything; if not, its seconds only say that longer is longer."""
        return bool(self._steps)

    def learn_from(self, jobs: Iterable[Job], warm: Iterable[Mapping[str, Any]] = ()) -> None:
        """Learn from completed jobs; before there is one, from what workers measured when they warmed up.

        Args:
            warm: `request`, `stage_seconds` and `made_steps` of each, as `making.Maker.warm`.
        """
        made = [(job.request, job.result["stage_seconds"], job.result["made_steps"]) for job in jobs]
        self.learn(made or [(one["request"], one["stage_seconds"], one["made_steps"]) for one in warm])

    def learn(self, finished: Iterable[tuple[Mapping[str, Any], Mapping[str, float], int]]) -> None:
        """Forget what was, and learn from these: request, seconds by stage, and steps of each."""
        steps, rests = defaultdict(list), defaultdict(list)
        for request, seconds, done in finished:
            size = Size.of(request)
            denoise = seconds.get("denoise", 0.0)
            if done:
                steps[size].append(denoise / done)
            rests[size].append(sum(seconds.values()) - denoise)
        self._steps = {size: statistics.median(found) for size, found in steps.items()}
        self._rests = {size: statistics.median(found) for size, found in rests.items()}

    def seconds(self, request: Mapping[str, Any], steps_left: int) -> float:
        """Seconds of a device for so many steps and what comes before and after them."""
        size = Size.of(request)
        step = _scaled(self._steps, size, _UNKNOWN_STEP)
        return steps_left * step + _scaled(self._rests, size, _UNKNOWN_REST)


def _scaled(known: Mapping[Size, float], size: Size, unknown: float) -> float:
    if size in known:
        return known[size]
    if not known:
        return unknown
    nearest = min(known, key=lambda other: abs(other.work - size.work))
    return known[nearest] * size.work / nearest.work
