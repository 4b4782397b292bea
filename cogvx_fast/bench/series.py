"""The base of all series: a kind of rows, and all that is done with it. Each kind is one class in a file of its own.

Reading and showing rows loads neither the engine nor diffusers; measuring imports them when it is asked for.
"""

from __future__ import annotations

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .rows import MIN_RUNS, Row, RowError
from .workloads import Workload

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .contenders import Contender

Sink = Callable[[Row], None]  # is given each row when it is made
Tell = Callable[[str], None]  # is told, in words, what is being done


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        dtype: name of a torch dtype.
        device: "cpu", "cuda", "cuda:1".
        command: that makes these rows, as a user would type it.
        contenders: names, in the order in which they alternate; None: all that the series has.
        runs: timed calls of each contender, at least `MIN_RUNS`.
        warmup: calls of each before the first that is timed, those of the gate aside; None: as the workload has it.
    """

    workload: Workload
    dtype: str
    device: str
    command: str
    contenders: Sequence[str] | None = None
    runs: int = MIN_RUNS
    warmup: int | None = None

    def __post_init__(self) -> None:
        if self.runs < MIN_RUNS:
            raise ValueError(f"runs={self.runs} must be at least {MIN_RUNS}")
        self.workload.check(self.device)


class Series(ABC):
    """Rows that may be compared: one run of one workload in one dtype on one device, in the order they were made.

    The class says how such rows are measured and what each must state; an instance shows those of a run.

    Attributes:
        name: of the series, as rows have it.
        label: what a title says of it; "" for what goes without saying.
        has_plot: whether there is a picture of it.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    has_plot: ClassVar[bool] = True

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self.first = self.rows[0]

    # Measuring

    @classmethod
    def check_workload(cls, workload: Workload, device: str) -> None:
        """Raise a ValueError that gives the reason if `workload` cannot be measured on `device`."""
        workload.check(device)

    @classmethod
    def choices(cls) -> Mapping[str, Contender]:
        """The contenders that a user may choose among, in order; none where the series has its own list."""
        return {}

    @classmethod
    def left_out(cls, plan: Plan) -> dict[str, str]:
        """Contenders that the plan's device does not run, and why, in words.

        Raises:
            ValueError: if one of them was asked for.
        """
        return {}

    @classmethod
    def run(cls, plan: Plan, sink: Sink = lambda row: None, tell: Tell = lambda text: None) -> list[Row]:
        """Measure; every row goes to `sink` when it is made, and all are returned.

        Raises:
            ValueError: for what cannot be measured, before any work.
        """
        raise ValueError(f"rows of {cls.name} are not made by a benchmark run")

    # Checking

    @classmethod
    def check(cls, row: Row) -> None:
        """Raise a RowError if a row of this series does not state what it must: figures in extras, and no times."""
        row.check_states_no_speed(f"a row of {cls.name} has n and extras, and no times")
        if row.n < 1 or not row.extras:
            raise RowError(f"a row of {cls.name} has n and extras, and no times: n={row.n}, {len(row.extras)} extras")

    # Showing

    @property
    def title(self) -> str:
        return ", ".join(filter(None, (self.first.workload, self.first.dtype, self.label)))

    @property
    def slug(self) -> str:
        """A name for files."""
        device = "".join(c if c.isalnum() else "-" for c in self.first.provenance.device_name.lower())
        return "-".join(part for part in f"{self.title.replace(', ', '-')}-{device}".split("-") if part)

    @property
    def stages(self) -> list[str]:
        return list(dict.fromkeys(row.stage for row in self.rows))

    def of_stage(self, stage: str) -> list[Row]:
        return [row for row in self.rows if row.stage == stage]

    @abstractmethod
    def table(self, others: Sequence[Series]) -> str:
        """The rows as a Markdown table; `others`: all series of the report, for what is said of the same elsewhere."""

    def plot(self, others: Sequence[Series]) -> bytes:
        """The rows as PNG.

        Raises:
            ValueError: for a series without `has_plot`.
        """
        raise ValueError(f"{self.title} has no plot: its table says it")

    def image(self, folder: str) -> str:
        """The plot as Markdown has it, from a folder as links on the page need it; "" without a plot."""
        return f"![{self.title}]({folder}/{self.slug}.png)" if self.has_plot else ""

    @classmethod
    def line(cls, row: Row) -> str:
        """What the console says of a row when it is made, after what it is of."""
        return row.gate_detail

    def remarks(self) -> list[str]:
        """What the console says when all rows are made, a line each."""
        return []

    def conditions(self) -> list[str]:
        """What was run, as parts of `origin`."""
        shape = self.first.shapes
        layers, of = shape.get("layers"), shape.get("layers_of_the_real_model")
        return [
            f"{layers} of {of} layers" if layers != of else f"{layers} layers",
            f"batch {shape.get('batch')}, {shape.get('num_frames')} frames of "
            f"{shape.get('height')}x{shape.get('width')} ({shape.get('tokens'):,} tokens)",
        ]

    def origin(self) -> str:
        """Where the rows come from, in a sentence."""
        row, origin = self.first, self.first.provenance
        commit = "no commit known" if origin.git_commit is None else f"commit {origin.git_commit[:10]}"
        parts = [
            origin.device_name,
            f"{origin.threads} threads"
            if origin.cuda is None
            else f"power limit {origin.cuda.get('power_limit_watts')} W",
            *self.conditions(),
            f"torch {origin.versions.get('torch')}, diffusers {origin.versions.get('diffusers')}",
            commit + (" with changes" if origin.git_commit is not None and origin.git_dirty else ""),
            row.time[:10],
        ]
        return "; ".join(parts) + f". `{row.command}`"

    def details(self) -> str:
        """What the rows measure, which engine they ran, and what else they say."""
        lines = []
        for row in self.rows:
            extras = ", ".join(f"{name} {value:.4g}" for name, value in row.extras.items())
            gpu = gpu_in_words(row.gpu_state)
            expected = f"expected: {row.expected_why}" if row.expected_why else ""
            said = [row.measures, *row.engine_report, extras, gpu, expected]
            lines.append(f"- **{row.stage}, {row.contender}**: {'; '.join(part for part in said if part)}")
        return "<details><summary>What was measured</summary>\n\n" + "\n".join(lines) + "\n\n</details>"

    def png(self, figure: Figure) -> bytes:
        """The figure under the series' title, as PNG."""
        figure.suptitle(f"{self.title} on {self.first.provenance.device_name}", fontsize=11)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
        return buffer.getvalue()


def gpu_in_words(state: Mapping[str, Any] | None) -> str:
    """What a row's `gpu_state` says, with its warning; "" for None."""
    if state is None:
        return ""
    if not state["samples"]:
        return f"clocks not known: {state['why_none']}"
    units = {"sm_clock_mhz": "MHz", "memory_clock_mhz": "MHz", "power_watts": "W", "temperature_celsius": "°C"}
    parts = [
        f"{name.rsplit('_', 1)[0].replace('_', ' ')} {state[name]['min']:g} to {state[name]['max']:g} {unit},"
        f" median {state[name]['median']:g}"
        for name, unit in units.items()
        if name in state
    ]
    return ", ".join(parts) + (f"; WARNING: {state['warning']}" if state["warning"] else "")


def markdown_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells without line breaks."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *lines))


def seconds(value: float | None) -> str:
    """A time with three significant digits and its unit; "" for None."""
    if value is None:
        return ""
    factor, unit = next(
        ((factor, unit) for factor, unit in ((1.0, "s"), (1e3, "ms")) if value * factor >= 1), (1e6, "µs")
    )
    value *= factor
    decimals = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{decimals}f} {unit}"


def size(value: float | None) -> str:
    """Bytes in MB or GB of a million and a billion; "" for None."""
    if value is None:
        return ""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def factor(value: float | None, digits: int = 2) -> str:
    """A ratio with an x behind it; "" for None."""
    return "" if value is None else f"{value:.{digits}f}x"
