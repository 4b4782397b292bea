"""The stages of a calibration, each of which is kept on disk so that one that was stopped goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ... import __version__
from ...files import write_whole
from ..files import ScheduleFile
from ..identity import Identity
from ..schedule import COMPUTED, Distance, StepSchedule
from ..skipping import StepSkipping
from . import recording
from .recording import Recording
from .search import best_schedules

SPAN = 2  # steps that are predicted to see what an error comes to
BLACK = 2e-3  # of frames in [0, 1]: a spread of every colour below which there is nothing on them
# Shares of the steps at which errors are made on purpose: closer at the end, where nothing is left to correct them.
PLACES = (0.06, 0.16, 0.3, 0.46, 0.62, 0.76, 0.86, 0.92, 0.96)
# Powers of the measured gains that schedules are searched with. All of it is right for small errors; of large ones in
# the first steps, which decide what is seen, a clip does not come back, and the measurement does not know it.
POWERS = (0.0, 0.5, 1.0)
AS_GOOD = 1.1  # times the least error: what a few prompts do not tell apart
# Evaluations that are checked, as shares of the steps: 25, 21, 17, 14, 12, 10 and 8 of 50.
CHECKED = (0.5, 0.42, 0.34, 0.28, 0.24, 0.2, 0.16)


class CalibrationError(ValueError):
    """Generations from which nothing can be learned."""


@dataclass(frozen=True)
class Plan:
    """What a calibration does.

    Attributes:
        calls: arguments of the pipeline for each prompt that is learned from, and its generator's seed as `seed`;
            without those that a calibration gives: steps, guidance, generator and the kind of output.
        checks: likewise of those that the schedules are checked on.
        steps, guidance: of all of them.
        disturbed: of the calls, on how many it is measured what an error comes to.
        tried: likewise, on how many the powers of the gains are tried.
    """

    calls: Sequence[dict[str, Any]]
    checks: Sequence[dict[str, Any]]
    steps: int = 50
    guidance: float = 6.0
    disturbed: int = 2
    tried: int = 4

    @property
    def places(self) -> list[int]:
        """Steps behind which errors are made on purpose."""
        possible = (min(max(1, round(place * self.steps)), self.steps - 1 - SPAN) for place in PLACES)
        return sorted(set(possible))

    @property
    def checked(self) -> list[int]:
        """Numbers of evaluations that the schedules are checked at."""
        return sorted({max(4, round(share * self.steps)) for share in CHECKED}, reverse=True)

    @property
    def evaluations(self) -> int:
        """Evaluations of the network in the whole calibration."""
        full = (len(self.calls) + len(self.checks)) * self.steps
        disturbed = min(self.disturbed, len(self.calls)) * sum(self.steps - place - 1 - SPAN for place in self.places)
        tried = min(self.tried, len(self.calls)) * (self.steps + len(POWERS) * sum(self.checked))
        return full + disturbed + tried + len(self.checks) * sum(self.checked)


@dataclass
class _Kept:
    """Results by name, in a folder: what is there is not computed again."""

    folder: Path
    tell: Callable[[int], None]

    def get(self, name: str, evaluations: int, compute: Callable[[], Any]) -> Any:
        path = self.folder / f"{name}.json"
        try:
            value = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError):  # not there, or broken
            value = compute()
            write_whole(path, json.dumps(value).encode())
        self.tell(evaluations)
        return value


def calibrate(pipeline: Any, plan: Plan, folder: Path, tell: Callable[[int], None] = lambda done: None) -> ScheduleFile:
    """The schedules of a pipeline's checkpoint and scheduler, with distances of those that were checked.

    Args:
        pipeline: a fast one that computes all steps.
        folder: of results in between; it may hold those of the same calibration, stopped before.
        tell: is called with the number of evaluations that something took, when that is done.

    Raises:
        CalibrationError: for generations that are black.
        ValueError: for ones that are not finite.
    """
    kept = _Kept(folder, tell)
    pipeline.scheduler.set_timesteps(plan.steps)
    timesteps = [int(t) for t in pipeline.scheduler.timesteps]
    every = StepSchedule(COMPUTED * plan.steps, tuple(map(float, timesteps)))
    runs = _Runs(pipeline, plan, every, recording.step_sizes(pipeline.scheduler.alphas_cumprod, timesteps))
    learned = [
        kept.get(f"learned-{number}", runs.cost(number), lambda: runs.learn(number))  # noqa: B023
        for number in range(len(plan.calls))
    ]
    products = np.mean([entry["products"] for entry in learned], axis=0)
    gains, measured = _gains([entry["gains"] for entry in learned if entry["gains"]], plan)
    candidates = {power: best_schedules(products, runs.sizes, gains**power, every.timesteps) for power in POWERS}
    checked = [number for number in plan.checked if number in candidates[1.0]]
    cost = plan.steps + len(POWERS) * sum(checked)
    tried = [
        kept.get(f"tried-{number}", cost, lambda: runs.compare(number, candidates, checked))  # noqa: B023
        for number in range(min(plan.tried, len(plan.calls)))
    ]
    errors = np.mean(tried, axis=0)  # powers, evaluations
    powers = [_chosen_power(of_number) for of_number in errors.T]
    schedules = {
        number: candidates[min(zip(checked, powers, strict=True), key=lambda pair: abs(pair[0] - number))[1]][number]
        for number in candidates[1.0]
    }
    psnrs = [
        kept.get(f"checked-{number}", plan.steps + sum(checked), lambda: runs.check(number, schedules, checked))  # noqa: B023
        for number in range(len(plan.checks))
    ]
    for place, number in enumerate(checked):
        values = [clip[place] for clip in psnrs]
        distance = Distance(round(float(np.mean(values)), 2), round(min(values), 2), len(values))
        schedules[number] = replace(schedules[number], distance=distance)
    found = {
        "prompts": len(plan.calls),
        "guidance_scale": plan.guidance,
        "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
        "size": {name: plan.calls[0][name] for name in ("num_frames", "height", "width") if name in plan.calls[0]},
        "gains": {str(place): round(float(gains[place]), 4) for place in plan.places},
        "gains_from": measured,
        "error_by_power_of_gains": {
            str(number): dict(zip(map(str, POWERS), np.sqrt(errors[:, place]).round(5).tolist(), strict=True))
            for place, number in enumerate(checked)
        },
        "cogvx_fast": __version__,
        "torch": torch.__version__,
    }
    return ScheduleFile(Identity.of(pipeline.transformer, pipeline.scheduler), found, schedules)


def _chosen_power(errors: np.ndarray) -> float:
    """The smallest of `POWERS`, which relies least on gains, whose error is as good as the least.

    Args:
        errors: squared, by power.
    """
    return POWERS[int(np.argmax(errors <= AS_GOOD**2 * errors.min()))]


def _gains(measured: list[dict[str, float]], plan: Plan) -> tuple[np.ndarray, str]:
    """What share of an error at each step is left at the end, and where that is from in words."""
    if not measured:
        return np.ones(plan.steps), "taken for equal: no error stood out from the rounding of this dtype"
    places = sorted({int(place) for entry in measured for place in entry})
    values = [np.exp(np.mean([np.log(entry[str(p)]) for entry in measured if str(p) in entry])) for p in places]
    gains = np.exp(np.interp(np.arange(plan.steps), places, np.log(values)))
    return gains, f"measured behind {len(places)} steps, between them on lines of the logarithm"


@dataclass
class _Runs:
    """The generations of a calibration."""

    pipeline: Any
    plan: Plan
    every: StepSchedule
    sizes: np.ndarray

    def cost(self, number: int) -> int:
        """Evaluations that `learn` takes."""
        if number >= self.plan.disturbed:
            return self.plan.steps
        return self.plan.steps + sum(self.plan.steps - place - 1 - SPAN for place in self.plan.places)

    def learn(self, number: int) -> dict[str, Any]:
        """What one full generation tells, and for the first ones what errors come to."""
        call = self.plan.calls[number]
        record, latents = self._recorded(call)
        self._check_frames(self._frames(latents), call)
        products = record.products()
        gains = {}
        if number < self.plan.disturbed:
            gains = self._gains_of(call, record, latents, products)
        return {"products": products.tolist(), "gains": gains}

    def _gains_of(
        self, call: dict[str, Any], record: Recording, latents: torch.Tensor, products: np.ndarray
    ) -> dict[str, float]:
        """By step, what share of an error behind it is left at the end, where that is more than rounding."""
        unit = math.sqrt(float(torch.stack(record.guided).double().square().sum(dim=1).mean()))
        scale = math.sqrt(latents.numel() / record.guided[0].numel())  # where only a sample is compared
        # The same steps in another order of rounding: an error of one unit of rounding, made at the first step.
        nudged = [record.outputs[0] * (1 + 2 * torch.finfo(record.outputs[0].dtype).eps)]
        floor = self._left(call, nudged, latents)
        found = {}
        for place in self.plan.places:
            known = recording.disturbed(record.outputs, place, SPAN)
            left = self._left(call, known, latents)
            made = recording.error_of_line(products, self.sizes, place, SPAN) * unit * scale
            if made > 0 and left > 2 * floor:
                found[str(place)] = math.sqrt(left**2 - floor**2) / made
        return found

    def _left(self, call: dict[str, Any], known: list[torch.Tensor], latents: torch.Tensor) -> float:
        _, found = self._recorded(call, known)
        return float((found.float() - latents.float()).norm())

    def compare(
        self, number: int, candidates: dict[float, dict[int, StepSchedule]], checked: list[int]
    ) -> list[list[float]]:
        """Squared errors of a clip's latents, relative, by power and number of evaluations."""
        call = self.plan.calls[number]
        expected = self._run(call, StepSkipping(self.every)).double()
        made: dict[str, float] = {}
        for schedules in candidates.values():
            for evaluations in checked:
                strip = schedules[evaluations].strip
                if strip not in made:
                    found = self._run(call, StepSkipping(schedules[evaluations])).double()
                    made[strip] = float((found - expected).square().sum() / expected.square().sum())
        return [[made[schedules[n].strip] for n in checked] for schedules in candidates.values()]

    def check(self, number: int, schedules: dict[int, StepSchedule], checked: list[int]) -> list[float]:
        """PSNR of a clip's frames for each of those numbers of evaluations, in dB."""
        call = self.plan.checks[number]
        reference = self._frames(self._run(call, StepSkipping(self.every)))
        self._check_frames(reference, call)
        found = []
        for evaluations in checked:
            frames = self._frames(self._run(call, StepSkipping(schedules[evaluations])))
            error = float((frames - reference).double().square().mean())
            found.append(round(-10 * math.log10(max(error, 1e-10)), 3))
        return found

    def _recorded(
        self, call: dict[str, Any], known: list[torch.Tensor] | None = None
    ) -> tuple[Recording, torch.Tensor]:
        record = Recording(self.every, self.plan.guidance, known)
        return record, self._run(call, record)

    def _run(self, call: dict[str, Any], skipping: StepSkipping) -> torch.Tensor:
        arguments = {name: value for name, value in call.items() if name != "seed"}
        with recording.skipping_by(self.pipeline, skipping):
            return self.pipeline(
                **arguments,
                num_inference_steps=self.plan.steps,
                guidance_scale=self.plan.guidance,
                generator=torch.Generator().manual_seed(call["seed"]),
                output_type="latent",
            ).frames

    def _frames(self, latents: torch.Tensor) -> torch.Tensor:
        pieces = [piece.float() for piece in self.pipeline.decode_stream(latents)]
        return (torch.cat(pieces, dim=2) / 2 + 0.5).clamp(0, 1)

    def _check_frames(self, frames: torch.Tensor, call: dict[str, Any]) -> None:
        if float(frames.std(dim=(0, 2, 3, 4)).max()) < BLACK:
            raise CalibrationError(
                f"the video of {call.get('prompt')!r} is of one colour: nothing can be learned from it"
            )
