"""Time against distance: what each recipe does to videos, beside what a step of it takes in time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .comparison import Group
from .quality import snr_db
from .rows import Row
from .words import seconds, size

EXACT = "ours"
_FACTORS = ("background", "color", "shape", "motion")
_COLUMNS = (
    "contender",
    "{step}",
    "x exact",
    "weights and step",
    "SNR of the step",
    "PSNR (lowest)",
    "SSIM",
    "latents' error, step 1 and 50",
    f"right: {', '.join(_FACTORS)}",
)


@dataclass(frozen=True)
class Point:
    """A contender: its row of a step's time, its row of quality, either None if there is none; exact's of the same run.

    A recipe of ours is called by its name alone, as its rows of quality are; torchao's in diffusers by their contender.
    """

    name: str
    timed: Row | None
    quality: Row | None
    exact: Row | None

    @property
    def gain(self) -> float | None:
        """How many times as fast as exact."""
        if self.timed is None or self.exact is None or None in (self.timed.p50_seconds, self.exact.p50_seconds):
            return None
        return self.exact.p50_seconds / self.timed.p50_seconds

    @property
    def memory(self) -> float | None:
        """Bytes of the transformer's weights and of a step on top."""
        if self.timed is None or self.timed.peak_memory_bytes is None or "weights_bytes" not in self.timed.extras:
            return None
        on_top = 0 if self.timed.provenance.cuda is not None else self.timed.extras["weights_bytes"]
        return self.timed.peak_memory_bytes + on_top

    @property
    def snr_db(self) -> float | None:
        """Of a step against the reference, in decibels."""
        return None if self.timed is None or self.timed.error is None else snr_db(self.timed.error)

    @property
    def psnr_db(self) -> float | None:
        """Of the videos against exact's."""
        return None if self.quality is None else self.quality.extras["psnr_db"]


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
    """All that was timed beside a group of quality rows, and what was not; `others`: all groups."""
    timed = timed_group(quality, others)
    rows = {} if timed is None else {row.contender: row for row in timed.of_stage("dit-step")}
    exact = rows.get(EXACT)
    judged = {f"{EXACT}-{row.contender}": row for row in quality.rows}
    found = [
        Point(contender.removeprefix(f"{EXACT}-"), row, judged.get(contender), exact) for contender, row in rows.items()
    ]
    found += [Point(row.contender, None, row, exact) for contender, row in judged.items() if contender not in rows]
    return found


def front(found: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of pairs (time, quality) those than which none is both faster and better, the fastest first."""
    kept: list[tuple[float, float]] = []
    for time, quality in sorted(found, key=lambda pair: (pair[0], -pair[1])):
        if not kept or quality > kept[-1][1]:
            kept.append((time, quality))
    return kept


def table(quality: Group, others: Sequence[Group]) -> str:
    """The contenders as a Markdown table: a step's time and memory, distance of step and videos, what they show."""
    timed = timed_group(quality, others)
    step = "time of a step" if timed is None else f"{timed.first.workload} step"
    lines = [[column.format(step=step) for column in _COLUMNS], ["---"] * len(_COLUMNS)]
    shown = points(quality, others)
    if all(point.name != EXACT for point in shown):
        shown.insert(0, Point(EXACT, None, None, None))
    for point in shown:
        row, judged = point.timed, point.quality
        refused = next((r.gate_detail for r in (row, judged) if r is not None and r.gate == "red"), None)
        lines.append(
            [
                {EXACT: "exact"}.get(point.name, point.name) + (f" (refused: {refused})" if refused else ""),
                "" if row is None else seconds(row.p50_seconds),
                "" if point.gain is None else f"{point.gain:.2f}x",
                size(point.memory),
                "" if point.snr_db is None else f"{point.snr_db:.1f} dB",
                *_of_videos(point.name, judged, quality.first),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _of_videos(name: str, row: Row | None, any_row: Row) -> list[str]:
    """The cells of videos: for exact what they show, as every row of quality says of it."""
    if name == EXACT:
        return ["", "", "", _accuracy(any_row, "_exact")]
    if row is None:
        return [""] * 4
    extras = row.extras
    return [
        f"{extras['psnr_db']:.1f} dB ({extras['psnr_lowest_db']:.1f})",
        f"{extras['ssim']:.4f}",
        f"{extras['latent_error_step_1']:.2g}, {extras['latent_error_step_50']:.2g}",
        _accuracy(row, ""),
    ]


def _accuracy(row: Row, suffix: str) -> str:
    return ", ".join(f"{row.extras[f'{name}_accuracy{suffix}']:.0%}" for name in _FACTORS)
