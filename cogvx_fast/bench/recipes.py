"""Series of the quantization recipes: what a step of each takes, and what each does to videos."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .accuracy import FLOOR_DB, snr_db
from .comparison import BASELINE, COLORS, EXACT, TimedSeries
from .rows import Row
from .series import Series, factor, markdown_table, seconds, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection

    from .contenders import Builder, Contender

_STEP = "dit-step"
_FACTORS = ("background", "color", "shape", "motion")
_COLUMNS = (
    "x exact",
    "weights and step",
    "SNR of the step",
    "PSNR (lowest)",
    "SSIM",
    "latents' error, step 1 and 50",
    f"right: {', '.join(_FACTORS)}",
)


class Recipes(TimedSeries):
    """Each recipe beside exact, and beside diffusers with torchao on the same linears; they may lose precision."""

    name = label = "recipes"

    @classmethod
    def choices(cls) -> Mapping[str, Contender]:
        """Exact is held to its own budget, the others to `FLOOR_DB`."""
        from ..config import EngineConfig
        from .contenders import CONTENDERS, DENOISING, Contender, diffusers_torchao, ours, weighed
        from .engine import recipe_names, with_recipe

        plain = {name: CONTENDERS[name] for name in (BASELINE, EXACT)}
        contenders = {name: dataclasses.replace(one, build=weighed(one.build)) for name, one in plain.items()}

        def add(name: str, what: str, build: Builder, devices: tuple[str, ...] | None = None) -> None:
            contenders[name] = Contender(weighed(build), what, stages=DENOISING, devices=devices, floor_db=FLOOR_DB)

        def ours_with(config: EngineConfig) -> Builder:
            return functools.partial(ours, config=config)

        for name in recipe_names():
            on_gpu = ("cuda",) if name == "fp8" else None
            add(f"ours-{name}", f"cogvx_fast, recipe {name}", ours_with(with_recipe(name)), on_gpu)
        int8 = with_recipe("int8")
        torchaos, compiled = dataclasses.replace(int8, gemm="torchao"), dataclasses.replace(int8, compile="blocks")
        add("ours-int8-torchao", "the same with torchao's own products", ours_with(torchaos))
        add("ours-int8-compile", 'recipe int8 with compile="blocks"', ours_with(compiled))
        for suffix, compiles in (("", False), ("-compile-freeze", True)):
            build = functools.partial(diffusers_torchao, recipe="int8", compiles=compiles)
            add(f"diffusers-int8{suffix}", f"diffusers with torchao's int8{suffix.replace('-', ' ')}", build)
        return contenders


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
    def label(self) -> str:
        return "exact" if self.name == EXACT else self.name

    @property
    def gain(self) -> float | None:
        """How many times as fast as exact."""
        times = [None if row is None else row.p50_seconds for row in (self.exact, self.timed)]
        return None if times[0] is None or times[1] is None else times[0] / times[1]

    @property
    def memory(self) -> float | None:
        """Bytes of the transformer's weights and of a step on top."""
        if self.timed is None or self.timed.peak_memory_bytes is None or "weights_bytes" not in self.timed.extras:
            return None
        on_top = 0 if self.timed.provenance.cuda is not None else self.timed.extras["weights_bytes"]
        return self.timed.peak_memory_bytes + on_top

    @property
    def snr_db(self) -> float | None:
        """The signal-to-noise ratio of a step against the reference, in decibels."""
        return None if self.timed is None or self.timed.error is None else snr_db(self.timed.error)

    @property
    def psnr_db(self) -> float | None:
        """The PSNR of the videos against those of exact, in decibels."""
        return None if self.quality is None else self.quality.extras["psnr_db"]


class Quality(Series):
    """Distances and readings of each recipe's videos, `n` of them, beside the times of a step where those are known.

    The rows are made by `python -m tools.demo_model.recipes` and state no times.
    """

    name = label = "quality"

    def conditions(self) -> list[str]:
        return [self.first.measures]

    def timed(self, others: Sequence[Series]) -> Recipes | None:
        """The times that belong to these videos: of the same dtype and device, at the sizes of a real model."""
        same = [
            other
            for other in others
            if isinstance(other, Recipes)
            and other.first.dtype == self.first.dtype
            and other.first.provenance.device_name == self.first.provenance.device_name
        ]
        return max(same, key=lambda other: other.first.workload != self.first.workload, default=None)

    def points(self, others: Sequence[Series]) -> list[Point]:
        """All that was timed beside these videos, and what was not."""
        timed = self.timed(others)
        rows = {} if timed is None else {row.contender: row for row in timed.of_stage(_STEP)}
        exact = rows.get(EXACT)
        judged = {f"{EXACT}-{row.contender}": row for row in self.rows}
        found = [Point(name.removeprefix(f"{EXACT}-"), row, judged.get(name), exact) for name, row in rows.items()]
        return found + [Point(row.contender, None, row, exact) for name, row in judged.items() if name not in rows]

    def table(self, others: Sequence[Series]) -> str:
        """A line for each contender: a step's time and memory, distance of step and videos, what these show."""
        timed = self.timed(others)
        step = "time of a step" if timed is None else f"{timed.first.workload} step"
        shown = self.points(others)
        if all(point.name != EXACT for point in shown):
            shown.insert(0, Point(EXACT, None, None, None))
        return markdown_table(("contender", step, *_COLUMNS), [self._cells(point) for point in shown])

    def _cells(self, point: Point) -> list[str]:
        row, judged = point.timed, point.quality
        refused = next((r.gate_detail for r in (row, judged) if r is not None and r.gate == "red"), None)
        cells = [
            point.label + (f" (refused: {refused})" if refused else ""),
            "" if row is None else seconds(row.p50_seconds),
            factor(point.gain),
            size(point.memory),
            "" if point.snr_db is None else f"{point.snr_db:.1f} dB",
        ]
        if point.name == EXACT:  # every row says what exact's videos show
            return [*cells, "", "", "", _accuracy(self.first, "_exact")]
        if judged is None:
            return [*cells, "", "", "", ""]
        extras = judged.extras
        return [
            *cells,
            f"{extras['psnr_db']:.1f} dB ({extras['psnr_lowest_db']:.1f})",
            f"{extras['ssim']:.4f}",
            f"{extras['latent_error_step_1']:.2g}, {extras['latent_error_step_50']:.2g}",
            _accuracy(judged, ""),
        ]

    def plot(self, others: Sequence[Series]) -> bytes:
        """Over the time of a step, as a share of exact's, its signal-to-noise ratio and the videos' PSNR.

        A line joins those than which none is both faster and better; squares are diffusers.
        """
        from matplotlib.figure import Figure

        timed = self.timed(others)
        step = "a step" if timed is None else f"a {timed.first.workload} step"
        figure = Figure(figsize=(9, 4), layout="constrained")
        drawn: dict[str, PathCollection] = {}
        for axes, measure, words in zip(
            figure.subplots(1, 2),
            ("snr_db", "psnr_db"),
            ("signal-to-noise of the step, dB", "PSNR of the videos against exact, dB; 30 asked"),
            strict=True,
        ):
            drawn |= _draw_tradeoff(axes, self.points(others), measure)
            axes.set_xlabel(f"time of {step}, exact = 1", fontsize=8)
            axes.set_ylabel(words, fontsize=8)
        figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
        return self.png(figure)


def _draw_tradeoff(axes: Axes, points: Sequence[Point], measure: str) -> dict[str, PathCollection]:
    drawn, places = {}, []
    for number, point in enumerate(points):
        quality = getattr(point, measure)
        if point.gain is None or quality is None:
            continue
        places.append((1 / point.gain, quality))
        marker = "s" if point.name.startswith(BASELINE) else "o"
        drawn[point.label] = axes.scatter(*places[-1], color=f"C{number}", marker=marker, zorder=2)
    best = front(places)
    axes.plot([time for time, _ in best], [value for _, value in best], color=COLORS["baseline"], lw=0.8, zorder=1)
    axes.axvline(1, color=COLORS["baseline"], lw=1)
    axes.axhline(FLOOR_DB, color=COLORS["none"], lw=1)
    axes.set_xlim(0, 1.35 * max([1, *(time for time, _ in places)]))
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return drawn


def front(found: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The pairs (time, quality) than which no other is both faster and better, the fastest first."""
    kept: list[tuple[float, float]] = []
    for time, quality in sorted(found, key=lambda pair: (pair[0], -pair[1])):
        if not kept or quality > kept[-1][1]:
            kept.append((time, quality))
    return kept


def _accuracy(row: Row, suffix: str) -> str:
    return ", ".join(f"{row.extras[f'{name}_accuracy{suffix}']:.0%}" for name in _FACTORS)
