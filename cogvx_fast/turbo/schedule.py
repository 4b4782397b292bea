"""A schedule of steps: which of them the network computes, and what stands in for its output at the others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .speeds import LEAST_EVALUATIONS, SPEEDS

COMPUTED, PREDICTED = "#", "."
HISTORY = 2  # outputs that are kept


class ScheduleError(ValueError):
    """A schedule that is broken, or of something else than what it was to be used with."""


@dataclass(frozen=True)
class Distance:
    """How far videos were from those of all steps computed, when it was measured: PSNR of frames in dB.

    Attributes:
        worst_psnr_db: of the worst clip.
        clips: that were compared; none of them was looked at to find the schedule.
    """

    psnr_db: float
    worst_psnr_db: float
    clips: int

    def __str__(self) -> str:
        return f"{self.psnr_db:.1f} dB (worst {self.worst_psnr_db:.1f}) over {self.clips} clips"


@dataclass(frozen=True)
class StepSchedule:
    """Which steps are computed, and from what the others are predicted.

    The output at a predicted step is `w[0] * output(c1) + w[1] * output(c2) + w[2] * latents`, where c1 and c2 are the
    last two computed steps and `latents` is what enters the step. Where `weights` has none for a step, or another two
    were computed than the schedule says, the line through both outputs is followed.

    Attributes:
        strip: a character a step, "#" for one that is computed and "." for one that is predicted.
        timesteps: of its steps, falling.
        weights: by number of the step, from 0.
        places: of the steps, rising, in what lines are straight in; empty: their numbers.
        source: where it is from, in words.
        distance: that was found for it; None: it was not measured.
    """

    strip: str
    timesteps: tuple[float, ...]
    weights: Mapping[int, tuple[float, float, float]] = field(default_factory=dict)
    places: tuple[float, ...] = ()
    source: str = ""
    distance: Distance | None = None

    def __post_init__(self) -> None:
        if set(self.strip) - {COMPUTED, PREDICTED}:
            raise ScheduleError(f"strip {self.strip[:100]!r} must be of {COMPUTED!r} and {PREDICTED!r}")
        if not self.strip.startswith(COMPUTED * HISTORY):
            raise ScheduleError(
                f"strip {self.strip!r} must start with {COMPUTED * HISTORY!r}: there is no output before"
            )
        if len(self.timesteps) != len(self.strip) or any(a <= b for a, b in itertools.pairwise(self.timesteps)):
            raise ScheduleError(f"the timesteps of a strip of {len(self.strip)} must be as many, and fall")
        for step, numbers in self.weights.items():
            if not 0 <= step < len(self.strip) or self.strip[step] != PREDICTED:
                raise ScheduleError(f"weights of step {step}, which is not predicted in {self.strip!r}")
            if len(numbers) != HISTORY + 1 or not all(map(math.isfinite, numbers)):
                raise ScheduleError(f"weights {numbers} of step {step} must be {HISTORY + 1} finite numbers")

    @property
    def steps(self) -> int:
        return len(self.strip)

    @property
    def evaluations(self) -> int:
        """Evaluations of the network; both halves of guidance count as one."""
        return self.strip.count(COMPUTED)

    def is_computed(self, step: int) -> bool:
        return self.strip[step] == COMPUTED

    def before(self, step: int) -> tuple[int, ...]:
        """The last `HISTORY` computed steps before `step`, the newest first."""
        return tuple(i for i in reversed(range(step)) if self.is_computed(i))[:HISTORY]

    def weights_at(self, step: int, history: Sequence[int]) -> tuple[float, ...]:
        """The weights of the outputs at `history`, the newest first, and of the latents."""
        if step in self.weights and tuple(history) == self.before(step):
            return self.weights[step]
        return (*line(step, history, self.places), 0.0)

    def retargeted(self, timesteps: Sequence[float]) -> StepSchedule:
        """This schedule for other steps: as dense in evaluations at every noise level, with lines as predictors.

        Args:
            timesteps: of the steps that it is for, falling.
        """
        if tuple(timesteps) == self.timesteps:
            return self
        evaluations = max(LEAST_EVALUATIONS, round(self.evaluations * len(timesteps) / self.steps))
        # Evaluations so far as a share, at each of its own steps; read off between them by timestep.
        shares = [self.strip[:i].count(COMPUTED) / self.evaluations for i in range(self.steps)]
        places = [_between(t, self.timesteps, shares) for t in timesteps]
        strip, made = "", 0
        for step, place in enumerate(places):
            left = len(places) - step
            due = step < HISTORY or made <= place * evaluations - 1e-9 or evaluations - made >= left
            due = due and made < evaluations
            strip += COMPUTED if due else PREDICTED
            made += due
        why = f"{self.source}, moved from {self.steps} steps to {len(timesteps)} by noise level"
        return replace(self, strip=strip, timesteps=tuple(timesteps), weights={}, places=(), source=why, distance=None)

    def to_json(self) -> dict[str, Any]:
        content: dict[str, Any] = {"evaluations": self.evaluations, "strip": self.strip}
        if self.distance is not None:
            content["distance"] = vars(self.distance)
        if self.weights:
            content["weights"] = {str(step): list(numbers) for step, numbers in self.weights.items()}
        return content


def line(step: int, history: Sequence[int], places: Sequence[float] = ()) -> tuple[float, ...]:
    """Weights of the outputs at `history`, the newest first, that follow the line through the last two.

    The formula is linear extrapolation in `places`, or in the steps' numbers; of a single output it is that output.
    """
    if len(history) == 1:
        return (1.0,)
    there, newest, other = (float(places[i]) if places else float(i) for i in (step, *history[:HISTORY]))
    if newest == other:  # where signal is less than can be told from none
        return 1.0, 0.0
    ahead = (there - newest) / (newest - other)
    return 1 + ahead, -ahead


def log_snr(alphas_cumprod: Any, timesteps: Sequence[float]) -> tuple[float, ...]:
    """The logarithm of signal to noise at timesteps: lines in it are nearer to the outputs than in the steps' numbers.

    At the first step of a scheduler with zero terminal SNR it is that of 1e-8.

    Args:
        alphas_cumprod: of a scheduler, by timestep.
    """
    shares = [min(max(float(alphas_cumprod[int(t)]), 1e-8), 1 - 1e-8) for t in timesteps]
    return tuple(math.log(share / (1 - share)) for share in shares)


def evaluations_of(speed: float | str, steps: int) -> int:
    """How often the network is evaluated in a generation of `steps` at a speed, one of `SPEEDS` or a number.

    Raises:
        ScheduleError: for fewer than `LEAST_EVALUATIONS`, with the speeds that are possible.
    """
    rate = SPEEDS[speed] if isinstance(speed, str) else speed
    evaluations = math.ceil(steps / rate - 1e-9)
    if evaluations < LEAST_EVALUATIONS:
        raise ScheduleError(
            f"speed={speed!r} of num_inference_steps={steps} leaves {evaluations} evaluations of the network; at least"
            f" {LEAST_EVALUATIONS} are needed"
            + (
                f": speed at most {steps / LEAST_EVALUATIONS:g}"
                if steps > LEAST_EVALUATIONS
                else "; use tier 'balanced'"
            )
        )
    return evaluations


def _between(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """`ys` at `x`, on lines between `xs`, which fall; at its ends the end's own."""
    if x >= xs[0]:
        return ys[0]
    for (x0, x1), (y0, y1) in zip(itertools.pairwise(xs), itertools.pairwise(ys), strict=True):
        if x >= x1:
            return y0 + (y1 - y0) * (x0 - x) / (x0 - x1)
    return ys[-1]
