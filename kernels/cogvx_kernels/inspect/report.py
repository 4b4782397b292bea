"""Inspections as tables, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton

from .. import targets
from ..aot import farm
from . import inspection, machine_code, pipes, sass
from . import traffic as traffic_
from .inspection import TENSOR_GOAL, TRAFFIC_GOAL, Inspection

BEGIN, END = "<!-- kernels:begin", "<!-- kernels:end -->"
# The heavy half of the FMA pipe is a part of it, and nowhere the limit so far.
_PIPES = [*(pipe for pipe in pipes.PIPES if pipe != "fma heavy"), "memory"]
_HEAD = ["kernel", "GPU", "dtype", "configuration"]
_LEGEND = (
    "*Programs*: how many fit a multiprocessor, and what keeps more from it. *In its code*: products of matrices, "
    "else accesses to memory by bits a thread. *Ceiling*: of the time the tensor cores can be busy in the main loop. "
    "*Bytes*: moved for each element of the result, and as a multiple of every tensor once; what is small against "
    "the result is taken to stay in L2.",
    "Cycles of a multiprocessor for one trip of an inner loop of one program (of the whole code where there is no "
    "loop), by pipe; *special* are exp2 and the like, and slow conversions; *memory* is the time that device memory "
    "takes for the bytes, on the board of `cogvx_kernels/targets.py` for that GPU. Rates and their sources are in "
    "`cogvx_kernels/targets.py`. Waiting, bank conflicts and what the copy engine moves are not in it; *unknown* "
    "opcodes are in the issue cycles alone.",
)


def as_json(inspections: Sequence[Inspection]) -> list[dict[str, Any]]:
    """Everything, with the ceiling, the goals and the limiting pipe of each loop beside the numbers."""
    return [
        dataclasses.asdict(one)
        | {
            "loops": [dataclasses.asdict(loop) | {"limit": loop.cost.limit} for loop in one.loops],
            "tensor_ceiling": one.tensor_ceiling,
            "over_least_bytes": one.traffic and one.traffic.over_least,
            "meets_goal": one.meets_goal,
        }
        for one in inspections
    ]


def resource_rows(inspections: Sequence[Inspection]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of resources."""
    rows = []
    for one in inspections:
        took = one.resources
        code = ", ".join(f"{count} {kind}" for kind, count in (took.matrix or took.widths).items())
        spills = f"{took.spills}, {took.stack} B stack" if took.spills or took.stack else "0"
        shared, fit = f"{took.shared / 1024:.1f}", f"{took.programs}: {took.limited_by}"
        rows.append([*_head(one, inspections), str(took.registers), spills, shared, fit, code, _found(one)])
    return [*_HEAD, "registers", "spills", "shared, KiB", "programs", "in its code", "ceiling or bytes"], rows


def loop_rows(inspections: Sequence[Inspection]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of loops."""
    rows = []
    for one in inspections:
        for loop in one.loops:
            cost, whole = loop.cost, ", no loop" if loop.address is None else ""
            cycles = [f"{cost.cycles[pipe]:,.0f}" if cost.cycles.get(pipe) else "" for pipe in _PIPES]
            unknown = ", ".join(f"{count} {name}" for name, count in cost.unknown.items())
            ceiling = "" if cost.tensor_ceiling is None else f"{cost.tensor_ceiling:.0%}"
            rows.append(
                [*_head(one, inspections), f"{cost.instructions}{whole}", *cycles, cost.limit, ceiling, unknown]
            )
    return [*_HEAD, "instructions", *_PIPES, "limit", "ceiling", "unknown"], rows


def markdown(inspections: Sequence[Inspection]) -> str:
    """Both tables, with what their columns mean."""
    tables = [_table(*resource_rows(inspections)), _table(*loop_rows(inspections))]
    notes = [f"{one.target}: {one.note}." for one in inspections if one.note]
    return "\n\n".join(
        [part for pair in zip(_LEGEND, tables, strict=True) for part in pair] + list(dict.fromkeys(notes))
    )


def fingerprint(jobs: Sequence[farm.Job]) -> str:
    """Changes whenever a table of these jobs would have to be made anew; needs no compilation."""
    parts = [triton.__version__, *(farm.fingerprint(job) for job in jobs)]
    parts += [Path(str(module.__file__)).read_text(encoding="utf-8") for module in _READ_BY]
    parts.append(Path(__file__).read_text(encoding="utf-8"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


_READ_BY = (targets, inspection, machine_code, pipes, sass, traffic_)


def with_section(text: str, section: str, stamp: str) -> str:
    """`text` with `section` between the markers, the first of which carries the stamp.

    Raises:
        ValueError: if the markers are not there exactly once and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"needs one line that starts with {BEGIN} and after it one line {END}")
    return f"{text.split(BEGIN)[0]}{BEGIN} {stamp} -->\n{section}\n{END}{text.split(END)[1]}"


def stamp_of(text: str) -> str | None:
    """The stamp of the section in `text`, or None."""
    return text.split(BEGIN)[1].split("-->")[0].strip() if BEGIN in text else None


def plot(inspections: Sequence[Inspection]) -> bytes:
    """A PNG: for each configuration the time of each pipe in its main loop, as a share of the busiest one's.

    Raises:
        ImportError: without matplotlib, which the extra `plots` brings.
    """
    from matplotlib.figure import Figure  # no pyplot: nothing global is set, no display is needed

    pairs = [(one, one.main_loop.cost) for one in inspections if one.main_loop is not None]
    shown, costs = [one for one, _ in pairs], [cost for _, cost in pairs]
    shares = [[cost.cycles.get(pipe, 0) / cost.cycles[cost.limit] for pipe in _PIPES] for cost in costs]
    figure = Figure(figsize=(11, 1.2 + 0.26 * len(shown)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=1.2)
    for row, (one, cost) in enumerate(pairs):
        for column, pipe in enumerate(_PIPES):
            if cost.cycles.get(pipe):
                color = "white" if shares[row][column] > 0.6 else "black"
                cycles = f"{cost.cycles[pipe]:,.0f}"
                axes.text(column, row, cycles, ha="center", va="center", fontsize=7, color=color)
        color = {True: "#2a7a3b", False: "#b03030", None: "#606060"}[one.meets_goal]
        axes.text(len(_PIPES) - 0.4, row, _found(one), va="center", fontsize=7, color=color)
    axes.set_xticks(range(len(_PIPES)), _PIPES, fontsize=8)
    axes.xaxis.tick_top()
    names = [f"{label(one, shown)} {one.target} {one.configuration}" for one in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=7)
    axes.spines[:].set_visible(False)
    goals = f"goals: tensor cores busy {TENSOR_GOAL:.0%} or more, {TRAFFIC_GOAL:g} times the least bytes or less"
    axes.set_title(f"Cycles of a multiprocessor for one trip, by pipe; {goals}", fontsize=9, loc="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def label(one: Inspection, inspections: Sequence[Inspection]) -> str:
    """The kernel's name, and what it was compiled for as far as that tells it from others of the name."""
    others = [other.constants for other in inspections if other.kernel == one.kernel]
    telling = [
        f"no {name}" if value is None else f"{name} {value}"
        for name, value in one.constants.items()
        if any(other.get(name) != value for other in others)
    ]
    return f"{one.kernel} {', '.join(telling)}".strip()


def _head(one: Inspection, inspections: Sequence[Inspection]) -> list[str]:
    return [label(one, inspections), one.target, one.dtype, one.configuration]


def _found(one: Inspection) -> str:
    if one.tensor_ceiling is not None:
        return f"{one.tensor_ceiling:.0%}"
    if one.traffic is None:
        return "" if one.note else "loads in a loop"
    return f"{one.traffic.moved:.2f} B, {one.traffic.over_least:.2f} x"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
