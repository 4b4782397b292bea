"""Rows as pictures: a PNG for each group, a panel for each stage, a bar for each contender."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import write_whole
from .comparison import Group, groups, speedup
from .rows import Row
from .tradeoff import EXACT, front, points, timed_group
from .words import seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection
    from matplotlib.figure import Figure

_COLORS = {"green": "#2a78b5", "baseline": "#8c8c8c", "none": "#d9b44a", "lossy": "#9a6fb0"}


def write_plots(rows: Sequence[Row], folder: str | Path) -> list[Path]:
    """Write `<group>.png` for each group of `rows` that has a time into `folder`; each whole or not at all.

    Raises:
        ImportError: without matplotlib, which the extra `plots` brings.
        OSError: if a file cannot be written.
    """
    written = []
    found = groups(rows)
    for group in found:
        if group.is_sizes:  # the table says it
            continue
        path = Path(folder) / f"{group.slug}.png"
        write_whole(path, plot_tradeoff(group, found) if group.is_quality else plot(group))
        written.append(path)
    return written


def plot(group: Group) -> bytes:
    """The group as PNG: medians in seconds, whiskers from the 20th to the 80th percentile, factors over diffusers."""
    from matplotlib.figure import Figure  # no pyplot: nothing global is set, no display is needed

    stages = group.stages
    heights = [len(group.of_stage(stage)) + 1 for stage in stages]
    figure = Figure(figsize=(9, 0.38 * sum(heights) + 0.8), layout="constrained")
    panels = figure.subplots(len(stages), 1, squeeze=False, height_ratios=heights)[:, 0]
    for stage, axes in zip(stages, panels, strict=True):
        _panel(axes, group, stage)
    return _png(figure, group)


def plot_tradeoff(quality: Group, others: Sequence[Group]) -> bytes:
    """A group of quality rows as PNG: over the time of a step, as a share of exact's, its SNR and the videos' PSNR.

    A line joins those than which none is both faster and better; squares are diffusers.
    """
    from matplotlib.figure import Figure

    timed, found = timed_group(quality, others), points(quality, others)
    figure = Figure(figsize=(9, 4), layout="constrained")
    step = "a step" if timed is None else f"a {timed.first.workload} step"
    drawn: dict[str, PathCollection] = {}
    for axes, name, words in zip(
        figure.subplots(1, 2),
        ("snr_db", "psnr_db"),
        ("signal-to-noise of the step, dB", "PSNR of the videos against exact, dB; 30 asked"),
        strict=True,
    ):
        shown = [point for point in found if point.gain is not None and getattr(point, name) is not None]
        places = [(1 / point.gain, getattr(point, name)) for point in shown]
        for point, place in zip(shown, places, strict=True):
            marker = "s" if point.name.startswith("diffusers") else "o"
            label = "exact" if point.name == EXACT else point.name
            drawn[label] = axes.scatter(*place, color=f"C{found.index(point)}", marker=marker, zorder=2)
        best = front(places)
        axes.plot([time for time, _ in best], [value for _, value in best], color=_COLORS["baseline"], lw=0.8, zorder=1)
        axes.axvline(1, color=_COLORS["baseline"], lw=1)
        axes.axhline(30, color=_COLORS["none"], lw=1)
        axes.set_xlabel(f"time of {step}, exact = 1", fontsize=8)
        axes.set_ylabel(words, fontsize=8)
        axes.set_xlim(0, 1.35 * max([1, *(time for time, _ in places)]))
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return _png(figure, quality)


def _png(figure: Figure, group: Group) -> bytes:
    figure.suptitle(f"{group.title} on {group.first.provenance.device_name}", fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _panel(axes: Axes, group: Group, stage: str) -> None:
    rows = group.of_stage(stage)
    for position, row in enumerate(rows):
        if row.p50_seconds is None:
            axes.text(0, position, " refused: the gate is red", va="center", fontsize=8, color="#b03030")
            continue
        whiskers = [[row.p50_seconds - row.p20_seconds], [row.p80_seconds - row.p50_seconds]]
        color = _COLORS["baseline"] if row.contender.startswith("diffusers") else _COLORS[row.gate]
        axes.barh(position, row.p50_seconds, xerr=whiskers, color=color, height=0.7, error_kw={"lw": 1})
        factor = speedup(row, group)
        label = f" {seconds(row.p50_seconds)}" + (f", {factor:.2f}x" if factor is not None else "")
        axes.text(row.p80_seconds, position, label, va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row.contender for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.25 * max([row.p80_seconds for row in rows if row.p80_seconds is not None], default=1))
    axes.set_title(f"{stage}, seconds", fontsize=9, loc="left")
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
