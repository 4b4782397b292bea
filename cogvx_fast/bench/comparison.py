"""Rows of one run beside each other: how much faster, how far from the bound, and when compiling pays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .rows import SERIES, Row

BASELINE = "diffusers"


@dataclass(frozen=True)
class Group:
    """Rows that may be compared: one run of one workload in one dtype on one device, in the order they were made."""

    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        return self.rows[0]

    @property
    def title(self) -> str:
        return f"{self.first.workload}, {self.first.dtype}" + (
            f", {self.first.series}" if self.first.series != "contenders" else ""
        )

    @property
    def slug(self) -> str:
        """A name for files."""
        device = "".join(c if c.isalnum() else "-" for c in self.first.provenance.device_name.lower())
        return "-".join(part for part in f"{self.title.replace(', ', '-')}-{device}".split("-") if part)

    @property
    def is_ablation(self) -> bool:
        return self.first.series == "ablation"

    @property
    def is_quality(self) -> bool:
        return self.first.series == "quality"

    @property
    def is_sizes(self) -> bool:
        return self.first.series == "sizes"

    def of_stage(self, stage: str) -> list[Row]:
        return [row for row in self.rows if row.stage == stage]

    @property
    def stages(self) -> list[str]:
        return list(dict.fromkeys(row.stage for row in self.rows))


def groups(rows: Sequence[Row]) -> list[Group]:
    """The latest run of each workload, dtype, device and series, sorted by these; older runs are left out."""
    runs: dict[tuple, dict[str, list[Row]]] = {}
    for row in rows:
        key = (row.workload, row.dtype, row.provenance.device_name, SERIES.index(row.series))
        runs.setdefault(key, {}).setdefault(row.run, []).append(row)
    latest = (max(of_key.values(), key=lambda run: max(row.time for row in run)) for _, of_key in sorted(runs.items()))
    return [Group(tuple(run)) for run in latest]


def speedup(row: Row, group: Group) -> float | None:
    """How many times as fast as diffusers, eager, in the same stage; None without both times."""
    return _ratio(_find(group, row.stage, BASELINE), row)


def over_previous(row: Row, group: Group) -> float | None:
    """How many times as fast as the row before it in the same stage; None for the first, or without both times."""
    same = group.of_stage(row.stage)
    position = same.index(row)
    return _ratio(same[position - 1], row) if position else None


def over_bound(row: Row, group: Group) -> float | None:
    """The time as a multiple of the stage's arithmetic alone, by the fastest bound of the run; None without one."""
    bounds = [
        other.p50_seconds
        for other in group.of_stage(row.stage)
        if other.contender.startswith("arithmetic") and other.p50_seconds is not None
    ]
    if not bounds or row.p50_seconds is None or row.gate == "none":
        return None
    return row.p50_seconds / min(bounds)


def break_even(row: Row, group: Group) -> float | None:
    """How many calls it takes until a first call that is longer than diffusers' has paid; infinite if it never does.

    After n calls a contender has taken its first call and n - 1 of its median. None for diffusers itself, for a bound
    and without times.
    """
    base = _find(group, row.stage, BASELINE)
    if base is None or base is row or row.gate != "green" or base.p50_seconds is None or row.n == 1:
        return None
    more = row.first_call_seconds - base.first_call_seconds
    if more <= 0:
        return 1
    gain = base.p50_seconds - row.p50_seconds
    return math.inf if gain <= 0 else 1 + math.ceil(more / gain)


def _find(group: Group, stage: str, contender: str) -> Row | None:
    return next((row for row in group.of_stage(stage) if row.contender == contender), None)


def _ratio(slow: Row | None, fast: Row) -> float | None:
    if slow is None or slow.p50_seconds is None or fast.p50_seconds is None or fast.gate == "none":
        return None
    return slow.p50_seconds / fast.p50_seconds
