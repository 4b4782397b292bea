"""Series of servers under load: how long people wait, by how many of them come."""

from __future__ import annotations

from collections.abc import Sequence

from .comparison import COLORS
from .rows import Row, RowError
from .series import Series, factor, markdown_table, seconds
from .serving_load import PERCENTILES, rank_of

OURS, BASELINE = "ours", "baseline"
TARGET = 0.5  # of the baseline's p95, at the rate at which that has doubled
_TIMES = tuple(f"{what}_p{percent}_seconds" for what in ("first_event", "done") for percent in PERCENTILES)
_COUNTS = ("sent", "ended", "errors", "open")
_STATED = ("rate_per_second", "duration_seconds", "patience_seconds", *_COUNTS, "throughput_per_second", *_TIMES)


class Serving(Series):
    """One row for each rate and server, of one run in which both took turns at each rate; made by `bench serve`."""

    name = "serving"
    label = "serving"

    @classmethod
    def check(cls, row: Row) -> None:
        """Figures are in extras; a row whose gate is red has none."""
        row.check_states_no_speed(f"a row of {cls.name} has its times in extras")
        if row.gate == "red":
            if row.extras:
                raise RowError("the gate is red, so no latency may be stated: extras must be empty")
            return
        missing = [name for name in _STATED if not isinstance(row.extras.get(name), int | float)]
        if missing:
            raise RowError(
                f"a row of {cls.name} states {', '.join(_STATED)} in extras: {', '.join(missing)} is missing"
            )

    def conditions(self) -> list[str]:
        shape = self.first.shapes
        return [
            f"{shape['num_frames']} frames of {shape['height']}x{shape['width']}, {shape['num_inference_steps']} steps,"
            f" guidance {shape['guidance_scale']:g}"
        ]

    def of(self, contender: str) -> list[Row]:
        """Its rows that state times, by rate."""
        rows = [row for row in self.rows if row.contender == contender and row.gate != "red"]
        return sorted(rows, key=lambda row: row.extras["rate_per_second"])

    def table(self, others: Sequence[Series]) -> str:
        """A line for each rate and server, what is aimed at, and how videos were judged."""
        waits = ("first event p50", "p95", "p99", "done p50", "p95", "p99")
        columns = ("rate", "server", *_COUNTS, *waits, "videos a second")
        lines = []
        for row in sorted(self.rows, key=lambda row: row.extras.get("rate_per_second", 0.0)):
            if row.gate == "red":
                lines.append([row.stage, row.contender, f"refused: {row.gate_detail}", *[""] * (len(columns) - 3)])
                continue
            counts = [f"{row.extras[name]:,}" for name in _COUNTS]
            times = [_time(row, name) for name in _TIMES]
            throughput = f"{row.extras['throughput_per_second']:.2f}"
            lines.append([row.stage, row.contender, *counts, *times, throughput])
        words = "From when a request is due, which comes whether or not others are answered, to when its MP4 was"
        words += " fetched; *open*: still not answered at the end, these count as the slowest."
        return "\n\n".join((markdown_table(columns, lines), words, *self.remarks()))

    def remarks(self) -> list[str]:
        gates = dict.fromkeys(f"{row.contender}: {row.gate}, {row.gate_detail}" for row in self.rows)
        return [*filter(None, [self.verdict()]), f"Videos: {'; '.join(gates)}."]

    def verdict(self) -> str:
        """What became of the target: at the rate at which the baseline's p95 has doubled, ours is at most half of it.

        "" where there are not both.
        """
        base, ours = self.of(BASELINE), {row.stage: row for row in self.of(OURS)}
        if not base or not ours:
            return ""
        lowest = base[0].extras["done_p95_seconds"]
        doubled = next((row for row in base if row.extras["done_p95_seconds"] >= 2 * lowest), None)
        if doubled is None:
            return f"The baseline's p95 doubles at none of these rates ({base[-1].stage} at most)."
        if doubled.stage not in ours:
            return f"The baseline's p95 has doubled at {doubled.stage}, at which ours was not asked."
        share = ours[doubled.stage].extras["done_p95_seconds"] / doubled.extras["done_p95_seconds"]
        reached = "reached" if share <= TARGET else "NOT reached"
        return (
            f"At {doubled.stage} the baseline's p95 has doubled ({_time(base[0], 'done_p95_seconds')} to"
            f" {_time(doubled, 'done_p95_seconds')}); ours is {_time(ours[doubled.stage], 'done_p95_seconds')},"
            f" {factor(share)} of it: the target of at most {factor(TARGET)} is {reached}."
        )

    def plot(self, others: Sequence[Series]) -> bytes:
        """Time to the video over the rate: the median, and p95 as a bold line; a hollow mark is a lower bound."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4.2), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, what, title in zip(panels, ("done", "first_event"), ("video is there", "first event"), strict=True):
            for contender, color in ((BASELINE, COLORS["baseline"]), (OURS, COLORS["green"])):
                rows = self.of(contender)
                rates = [row.extras["rate_per_second"] for row in rows]
                for percent, width, style in ((50, 1.0, ":"), (95, 2.2, "-")):
                    name = f"{what}_p{percent}_seconds"
                    axes.plot(
                        rates,
                        [row.extras[name] for row in rows],
                        color=color,
                        lw=width,
                        ls=style,
                        label=f"{contender}, p{percent}",
                    )
                    for row in rows:
                        axes.plot(
                            row.extras["rate_per_second"],
                            row.extras[name],
                            marker="o",
                            ms=4,
                            color=color,
                            mfc="white" if _is_bound(row, name) else color,
                        )
            axes.set_title(f"{title}, seconds after the request", fontsize=9, loc="left")
            axes.set_xlabel("requests a second", fontsize=9)
            axes.set_yscale("log")
            axes.grid(alpha=0.25, which="both")
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].legend(fontsize=8, frameon=False)
        return self.png(figure)

    @classmethod
    def line(cls, row: Row) -> str:
        if row.gate == "red":
            return f"REFUSED, {row.gate_detail}"
        counts = ", ".join(f"{row.extras[name]} {name}" for name in _COUNTS)
        times = f"p50 {_time(row, 'done_p50_seconds')}, p95 {_time(row, 'done_p95_seconds')}"
        return f"{counts}; done {times}; first event p95 {_time(row, 'first_event_p95_seconds')}"


def _is_bound(row: Row, name: str) -> bool:
    """Whether a percentile falls on a request that was still open, so that it is longer than what is stated.

    Times to the first event are of requests that may have been heard of and yet be open: there it may be either.
    """
    extras = row.extras
    percent = float(name.split("_p")[1].split("_")[0])
    is_last = extras[name] >= extras["patience_seconds"]
    return bool(is_last and rank_of(percent, extras["ended"] + extras["open"]) > extras["ended"])


def _time(row: Row, name: str) -> str:
    return ("over " if _is_bound(row, name) else "") + seconds(row.extras[name])
