"""Series of the step-skipping methods: how far the videos of each are from all steps, at equal evaluations."""

from __future__ import annotations

from collections.abc import Sequence

from .comparison import COLORS
from .rows import Row, RowError
from .series import Series, markdown_table

ALL, ROUNDING = "all", "all (diffusers)"  # every step computed, by the engine and by diffusers
_FACTORS = ("background", "color", "shape", "motion")
# Paul Tol's bright palette and darker tones beside it: told apart with any colour vision, and by markers besides.
_COLORS = [
    "#4477AA",
    "#EE6677",
    "#228833",
    "#CCBB44",
    "#66CCEE",
    "#AA3377",
    "#222222",
    "#997700",
    "#994455",
    "#6699CC",
    "#DD7722",
    "#8877BB",
]
_MARKERS = "osD^vP*X<>"


class Skipping(Series):
    """One row for each method and number of evaluations; made by `python -m benchmarks.quality`, without times.

    A row whose gate is red is of a method that could not be brought to that number, and says why.
    """

    name = "turbo-quality"
    label = "skipping"

    @classmethod
    def check(cls, row: Row) -> None:
        row.check_states_no_speed(f"a row of {cls.name} states no times")
        asked = ["evaluations_asked"]
        if row.gate != "red":
            asked += ["evaluations", "psnr_db", "psnr_lowest_db", "ssim"]
        missing = [name for name in asked if name not in row.extras]
        if missing:
            raise RowError(f"a row of {cls.name} states {', '.join(asked)} in extras: {', '.join(missing)} is missing")

    def conditions(self) -> list[str]:
        return [self.first.measures]

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(row.contender for row in self.rows))

    @property
    def judged(self) -> list[Row]:
        """The rows of methods that have a distance."""
        return [row for row in self.rows if row.gate != "red" and row.contender not in (ALL, ROUNDING)]

    def table(self, others: Sequence[Series]) -> str:
        """A line for each method, a column for each number of evaluations; what was not reached is named below it."""
        asked = sorted({row.extras["evaluations_asked"] for row in self.rows}, reverse=True)
        cells = {(row.contender, row.extras["evaluations_asked"]): row for row in self.rows}
        lines = [
            [method, *(_cell(cells.get((method, evaluations))) for evaluations in asked)] for method in self.methods
        ]
        table = markdown_table(("method", *(f"{evaluations} evaluations" for evaluations in asked)), lines)
        words = "Each cell: PSNR in dB (of the worst clip), SSIM; then, where it is another, the number that it really"
        words += " took; then what of the prompts is read worse than from all steps, in points."
        refused = [
            f"- {row.contender}, {row.extras['evaluations_asked']}: {row.gate_detail}"
            for row in self.rows
            if row.gate == "red"
        ]
        return "\n\n".join(filter(None, (table, words, "\n".join(refused))))

    def plot(self, others: Sequence[Series]) -> bytes:
        """PSNR over the evaluations that a generation really took: the mean, and the worst clip as a thin line.

        A grey line is at the distance of two computations that differ in nothing but rounding.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 5), layout="constrained")
        axes = figure.subplots()
        for number, method in enumerate(dict.fromkeys(row.contender for row in self.judged)):
            found = sorted(
                (row for row in self.judged if row.contender == method), key=lambda row: row.extras["evaluations"]
            )
            color, turn = _COLORS[number % len(_COLORS)], number // len(_COLORS)
            taken = [row.extras["evaluations"] for row in found]
            axes.plot(taken, [row.extras["psnr_lowest_db"] for row in found], color=color, lw=0.6, ls=":")
            axes.plot(
                taken,
                [row.extras["psnr_db"] for row in found],
                color=color,
                marker=_MARKERS[(number + turn) % len(_MARKERS)],
                ls="--" if turn or "(diffusers)" in method else "-",
                lw=2.8 if method == "turbo" else 1.4,
                ms=5,
                label=method,
            )
        for row in (row for row in self.rows if row.contender == ROUNDING):
            axes.axhline(row.extras["psnr_db"], color=COLORS["baseline"], lw=1, zorder=1, label="rounding alone")
        axes.set_xlabel("evaluations of the network in a generation", fontsize=9)
        axes.set_ylabel("PSNR against all steps, dB; dotted: the worst clip", fontsize=9)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right center", fontsize=8, frameon=False)
        return self.png(figure)

    @classmethod
    def line(cls, row: Row) -> str:
        return f"{row.extras['evaluations_asked']} evaluations: {row.gate_detail}"


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row.gate == "red":
        return "not reached"
    extras = row.extras
    text = f"{extras['psnr_db']:.1f} ({extras['psnr_lowest_db']:.1f}), {extras['ssim']:.3f}"
    if abs(extras["evaluations"] - extras["evaluations_asked"]) >= 0.05:
        text += f"; {extras['evaluations']:.1f}"
    lost = {name: 100 * extras.get(f"{name}_difference", 0.0) for name in _FACTORS}
    worse = [f"{name} {points:.0f}" for name, points in lost.items() if points < -0.5]
    return text + (f"; {', '.join(worse)}" if worse else "")
