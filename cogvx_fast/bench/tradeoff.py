"""Time against distance: what each recipe does to videos, beside what a step of it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .comparison import Group
from .rows import Row

EXACT = "ours"
_FACTORS = ("background", "color", "shape", "motion")


@dataclass(frozen=True)
class Point:
    """A recipe: its row of quality, and how many times as fast as exact its step is, None where that is not known."""

    quality: Row
    gain: float | None

    @property
    def recipe(self) -> str:
        return self.quality.contender


def timed_group(quality: Group, others: Sequence[Group]) -> Group | None:
    """The recipes' times that belong to `quality`: of the same dtype and device, at the sizes of a real model."""
    same = [
        group
        for group in others
        if group.first.series == "recipes"
        and group.first.dtype == quality.first.dtype
        and group.first.provenance.device_name == quality.first.provenance.device_name
    ]
    return max(same, key=lambda group: group.first.workload != quality.first.workload, default=None)


def points(quality: Group, others: Sequence[Group]) -> list[Point]:
    """The recipes of a group of quality rows; `others`: all groups."""
    timed = timed_group(quality, others)
    seconds = {} if timed is None else {row.contender: row.p50_seconds for row in timed.of_stage("dit-step")}
    exact, found = seconds.get(EXACT), []
    for row in quality.rows:
        own = seconds.get(f"{EXACT}-{row.contender}")
        found.append(Point(row, exact / own if exact and own else None))
    return found


def table(quality: Group, others: Sequence[Group]) -> str:
    """The recipes as a Markdown table: speed of a step over exact, distance of the videos, what they show."""
    timed = timed_group(quality, others)
    step = "step" if timed is None else f"{timed.first.workload} step"
    lines = [
        [f"recipe | x exact, {step} | PSNR (lowest) | SSIM | latents' error, step 1 and 50 | right: exact, recipe"]
    ]
    lines.append(["---"] * 6)
    for point in points(quality, others):
        extras = point.quality.extras
        right = ", ".join(
            f"{name} {extras[f'{name}_accuracy_exact']:.0%} {extras[f'{name}_accuracy']:.0%}" for name in _FACTORS
        )
        lines.append(
            [
                point.recipe + ("" if point.quality.gate == "green" else f" (refused: {point.quality.gate_detail})"),
                "" if point.gain is None else f"{point.gain:.2f}x",
                f"{extras['psnr_db']:.1f} dB ({extras['psnr_lowest_db']:.1f})",
                f"{extras['ssim']:.4f}",
                f"{extras['latent_error_step_1']:.2g}, {extras['latent_error_step_50']:.2g}",
                right,
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
