"""All runs at a glance: the engine beside diffusers, a line for each stage that both ran."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .comparison import BASELINE, Group, speedup
from .rows import Row
from .tradeoff import EXACT
from .words import seconds, size

_COLUMNS = ("what", "size", "machine", "dtype", "diffusers", "ours", "faster", "memory of diffusers", "ours", "error")


def summary(found: Sequence[Group]) -> str:
    """A Markdown table; groups of contenders only. "" where none has both.

    *Memory* is a call's peak, *error* is a multiple of diffusers' own at that precision.
    """
    lines = [_cells(base, ours, group) for group in found for base, ours in _pairs(group)]
    if not lines:
        return ""
    return "\n".join(f"| {' | '.join(line)} |" for line in [_COLUMNS, ["---"] * len(_COLUMNS), *lines])


def _pairs(group: Group) -> Iterator[tuple[Row, Row]]:
    if group.first.series != "contenders":
        return
    for stage in group.stages:
        rows = {row.contender: row for row in group.of_stage(stage)}
        if BASELINE in rows and EXACT in rows:
            yield rows[BASELINE], rows[EXACT]


def _cells(base: Row, ours: Row, group: Group) -> list[str]:
    shape, faster = base.shapes, speedup(ours, group)
    # A distance from diffusers itself, where nothing wider fits, is no multiple of its error.
    error = ours.error / ours.own_error if ours.error is not None and ours.own_error else None
    return [
        f"{base.stage}, {base.workload}",
        f"{shape.get('num_frames')}x{shape.get('height')}x{shape.get('width')}",
        base.provenance.device_name,
        base.dtype,
        seconds(base.p50_seconds),
        "refused" if ours.gate == "red" else seconds(ours.p50_seconds),
        "" if faster is None else f"{faster:.2f}x",
        size(base.peak_memory_bytes),
        size(ours.peak_memory_bytes),
        "" if error is None else f"{error:.2f}x",
    ]
