"""Series of contenders that took turns: how much faster, how far from the bound, and when compiling pays."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from .. import devices
from .rows import Row, RowError
from .series import Plan, Series, Sink, Tell, factor, markdown_table, seconds, size

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes

    from .contenders import Contender
    from .workloads import Workload

BASELINE, EXACT = "diffusers", "ours"  # contenders that others are compared with
COLORS = {"green": "#2a78b5", "baseline": "#8c8c8c", "none": "#d9b44a", "lossy": "#9a6fb0"}
# What the README shows: the whole, a step of each model, and the largest decoding.
_OF_THE_README = (
    ("generation", "demo"),
    ("dit-step", "dit-2b"),
    ("dit-step", "dit-2b-layer"),
    ("dit-step", "dit-5b"),
    ("vae-decode", "vae-chunk"),
)
_SUMMARY = ("what", "size", "machine", "dtype", "diffusers", "ours", "faster", "memory of diffusers", "ours", "error")


class TimedSeries(Series):
    """Contenders that are judged and timed in one run: the base of every series that states times.

    Attributes:
        columns: of the table, names of `cells`, in order.
        takes_the_workloads: whether its contenders are those that a workload names.
    """

    takes_the_workloads: ClassVar[bool] = False

    columns: ClassVar[tuple[str, ...]] = (
        "stage",
        "contender",
        "time",
        "x diffusers",
        "x arithmetic",
        "first call",
        "pays after",
        "peak memory",
        "error (x diffusers' own)",
    )

    @classmethod
    def contenders(cls, workload: Workload, dtype: str, device: torch.device) -> Mapping[str, Contender]:
        """All contenders for a workload and a dtype, in the order in which they alternate.

        Args:
            device: where they are to run. Those that do not run there are among them: each says why, `why_not`.
        """
        return cls.choices()

    @classmethod
    def chosen(
        cls, workload: Workload, dtype: str, device: torch.device, names: Sequence[str] | None = None
    ) -> tuple[dict[str, Contender], dict[str, str]]:
        """The contenders that run on `device`, and why each of the others that could be expected does not.

        Args:
            names: of those that are wanted; None: as the workload has it, or all.

        Raises:
            ValueError: for a name that is not known, or is wanted and does not run there, with the reason.
        """
        known = cls.contenders(workload, dtype, device)
        given = names
        if names is None:
            default = workload.contenders if cls.takes_the_workloads else None
            names = list(known if default is None else default)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"contender {unknown[0]!r} is unknown; allowed: {', '.join(known)}")
        names = [name for name in names if given is not None or set(known[name].stages) & set(workload.stages)]
        reasons = {name: known[name].why_not(device, workload) for name in names}
        left_out = {name: reason for name, reason in reasons.items() if reason is not None}
        if given is not None and left_out:
            raise ValueError("; ".join(f"contender {name!r}: {reason}" for name, reason in left_out.items()))
        return {name: known[name] for name in names if name not in left_out}, left_out

    @classmethod
    def left_out(cls, plan: Plan) -> dict[str, str]:
        return cls.chosen(plan.workload, plan.dtype, devices.indexed(plan.device), plan.contenders)[1]

    @classmethod
    def run(cls, plan: Plan, sink: Sink = lambda row: None, tell: Tell = lambda text: None) -> list[Row]:
        from . import runner

        chosen, _ = cls.chosen(plan.workload, plan.dtype, devices.indexed(plan.device), plan.contenders)
        return runner.run(plan, chosen, cls.name, sink, tell)

    @classmethod
    def check(cls, row: Row) -> None:
        """Raise a RowError if a row states no times, or states them though the gate is red."""
        if row.gate != "red":
            row.check_states_times()
        elif row.n or row.extras:
            raise RowError("the gate is red, so no speed may be stated: n and extras must be empty")

    @classmethod
    def line(cls, row: Row) -> str:
        if row.gate == "red":
            return f"REFUSED, {row.gate_detail}"
        spread = f"{seconds(row.p20_seconds)} to {seconds(row.p80_seconds)}"
        warning = (row.gpu_state or {}).get("warning")
        said = f"{seconds(row.p50_seconds)} ({spread}), first call {seconds(row.first_call_seconds)}"
        return f"{said}; WARNING: {warning}" if warning else said

    def remarks(self) -> list[str]:
        counts = [(row, self.break_even(row)) for row in self.rows]
        return [
            f"{row.stage}: {row.contender} makes up for its first call "
            + ("never" if math.isinf(count) else f"after {count:,.0f} calls")
            for row, count in counts
            if count is not None and count > 1
        ]

    def speedup(self, row: Row) -> float | None:
        """How many times as fast as diffusers, eager, in the same stage; None without both times."""
        return _ratio(self._baseline(row.stage), row)

    def over_previous(self, row: Row) -> float | None:
        """How many times as fast as the row before it in the same stage; None for the first, or without both times."""
        same = self.of_stage(row.stage)
        position = same.index(row)
        return _ratio(same[position - 1], row) if position else None

    def over_bound(self, row: Row) -> float | None:
        """The time as a multiple of the stage's arithmetic alone, by the fastest bound of the run; None without one."""
        bounds = [
            other.p50_seconds
            for other in self.of_stage(row.stage)
            if other.contender.startswith("arithmetic") and other.p50_seconds is not None
        ]
        if not bounds or row.p50_seconds is None or row.gate == "none":
            return None
        return row.p50_seconds / min(bounds)

    def break_even(self, row: Row) -> float | None:
        """How many calls it takes until a first call that is longer than diffusers' has paid; infinite if never.

        After n calls a contender has taken its first call and n - 1 of its median. None for diffusers itself, for a
        bound and without times.
        """
        base = self._baseline(row.stage)
        if base is None or base is row or row.gate != "green" or row.n == 1:
            return None
        if base.p50_seconds is None or row.p50_seconds is None:
            return None
        if base.first_call_seconds is None or row.first_call_seconds is None:
            return None
        more = row.first_call_seconds - base.first_call_seconds
        if more <= 0:
            return 1
        gain = base.p50_seconds - row.p50_seconds
        return math.inf if gain <= 0 else 1 + math.ceil(more / gain)

    def _baseline(self, stage: str) -> Row | None:
        return next((row for row in self.of_stage(stage) if row.contender == BASELINE), None)

    def table(self, others: Sequence[Series] = ()) -> str:
        cells = [self.cells(row) for row in self.rows]
        return markdown_table(self.columns, [[of_row[column] for column in self.columns] for of_row in cells])

    def cells(self, row: Row) -> dict[str, str]:
        """What the table has to say of a row, by column."""
        if row.gate == "red":
            time = f"refused: {row.gate_detail}"
        else:
            spread = f"{seconds(row.p20_seconds)} to {seconds(row.p80_seconds)}" if row.n > 1 else "one call"
            time = f"{seconds(row.p50_seconds)} ({spread})"
        calls = self.break_even(row)
        error = "" if row.error is None else f"{row.error:.2g}"
        if row.error is not None and row.own_error:
            error += f" ({factor(row.error / row.own_error)})"
        return {
            "stage": row.stage,
            "contender": row.contender,
            "time": time.replace("|", "\\|"),
            "x the row before": factor(self.over_previous(row)),
            "expected": factor(row.expected_gain, digits=3),
            "x diffusers": factor(self.speedup(row)),
            "x arithmetic": factor(self.over_bound(row)),
            "first call": seconds(row.first_call_seconds),
            "pays after": "" if calls is None else "never" if math.isinf(calls) else f"{calls:,.0f} calls",
            "peak memory": size(row.peak_memory_bytes),
            "error (x diffusers' own)": error,
        }

    def plot(self, others: Sequence[Series] = ()) -> bytes:
        """A panel for each stage: medians in seconds, whiskers from the 20th to the 80th percentile, factors."""
        from matplotlib.figure import Figure  # no pyplot: nothing global is set, no display is needed

        heights = [len(self.of_stage(stage)) + 1 for stage in self.stages]
        figure = Figure(figsize=(9, 0.38 * sum(heights) + 0.8), layout="constrained")
        panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        for stage, axes in zip(self.stages, panels, strict=True):
            self._draw_stage(axes, stage)
        return self.png(figure)

    def _draw_stage(self, axes: Axes, stage: str) -> None:
        rows, longest = self.of_stage(stage), 0.0
        for position, row in enumerate(rows):
            p20, p50, p80 = row.p20_seconds, row.p50_seconds, row.p80_seconds
            if p20 is None or p50 is None or p80 is None:
                axes.text(0, position, " refused: the gate is red", va="center", fontsize=8, color="#b03030")
                continue
            longest = max(longest, p80)
            color = COLORS["baseline"] if row.contender.startswith(BASELINE) else COLORS[row.gate]
            axes.barh(position, p50, xerr=[[p50 - p20], [p80 - p50]], color=color, height=0.7, error_kw={"lw": 1})
            label = ", ".join(filter(None, (f" {seconds(p50)}", factor(self.speedup(row)))))
            axes.text(p80, position, label, va="center", fontsize=8)
        axes.set_yticks(range(len(rows)), [row.contender for row in rows], fontsize=8)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 1.25 * (longest or 1))
        axes.set_title(f"{stage}, seconds", fontsize=9, loc="left")
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)


class Comparison(TimedSeries):
    """The engine beside diffusers, eager and compiled, and beside what bounds it; the README shows it at a glance.

    A cold start is a stage of it: each call is a fresh process.
    """

    name, label = "contenders", ""
    takes_the_workloads = True

    @classmethod
    def choices(cls) -> Mapping[str, Contender]:
        from .busy import BESIDE
        from .contenders import CONTENDERS
        from .turbo import TURBO

        return {**CONTENDERS, **BESIDE, **TURBO}

    @classmethod
    def at_a_glance(cls, found: Sequence[Series]) -> str:
        """A table with a line for each stage that both the engine and diffusers ran; "" if there is none.

        *Memory* is a call's peak, *error* is a multiple of diffusers' own at that precision.
        """
        return _glance(pair for one in found if isinstance(one, Comparison) for pair in one.pairs())

    @classmethod
    def of_the_readme(cls, found: Sequence[Series]) -> str:
        """A few lines of `at_a_glance`; of several machines the one on which the engine gains least."""
        pairs = [pair for one in found if isinstance(one, Comparison) for pair in one.pairs()]
        chosen = []
        for stage, workload in _OF_THE_README:
            same = [p for p in pairs if (p[0].stage, p[0].workload, p[0].dtype) == (stage, workload, "bfloat16")]
            chosen += sorted(same, key=lambda pair: _ratio(*pair) or 0.0)[:1]
        return _glance(chosen)

    def pairs(self) -> Iterator[tuple[Row, Row]]:
        """diffusers and the engine, of each stage that both ran."""
        for stage in self.stages:
            rows = {row.contender: row for row in self.of_stage(stage)}
            if BASELINE in rows and EXACT in rows:
                yield rows[BASELINE], rows[EXACT]


def _glance(pairs: Iterable[tuple[Row, Row]]) -> str:
    lines = list(map(_line, pairs))
    return markdown_table(_SUMMARY, lines) if lines else ""


def _line(pair: tuple[Row, Row]) -> list[str]:
    base, ours = pair
    shape = base.shapes
    # A distance from diffusers itself, where nothing wider fits, is no multiple of its error.
    error = ours.error / ours.own_error if ours.error is not None and ours.own_error else None
    return [
        f"{base.stage}, {base.workload}",
        f"{shape.get('num_frames')}x{shape.get('height')}x{shape.get('width')}",
        base.provenance.device_name,
        base.dtype,
        seconds(base.p50_seconds),
        "refused" if ours.gate == "red" else seconds(ours.p50_seconds),
        factor(_ratio(base, ours)),
        size(base.peak_memory_bytes),
        size(ours.peak_memory_bytes),
        factor(error),
    ]


def _ratio(slow: Row | None, fast: Row) -> float | None:
    if slow is None or slow.p50_seconds is None or fast.p50_seconds is None or fast.gate == "none":
        return None
    return slow.p50_seconds / fast.p50_seconds
