"""Rows as text: the tables of the report, and the README's section between its markers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..files import write_whole
from . import tradeoff
from .comparison import Group, break_even, groups, over_bound, over_previous, speedup
from .rows import Row
from .summary import summary
from .words import seconds, size

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NOTHING = "Nothing has been measured yet: there are no result rows."
_LEGEND = (
    "Times are medians with the 20th and 80th percentile; contenders of a table alternated in one run. *x arithmetic*: "
    "the time as a multiple of the step's linears and attention alone, in the same run. *Pays after*: calls until a "
    "longer first call than diffusers' is made up for. *Error*: relative to diffusers in float32 (for float32: in "
    "float64), and as a multiple of diffusers' own at that precision; above 1.1 the speed is refused. *Recipes* may "
    "lose precision: refused is what is further than 30 dB from the reference in one step, or 30 dB PSNR in videos; "
    "*sizes*: resident memory of a fresh process, where freed memory is given back and, last, as glibc keeps it."
)


def report(rows: Sequence[Row], plots: str | None = None) -> str:
    """A page in Markdown: the latest run of each workload, dtype and device, with where it comes from.

    Args:
        plots: folder of the plots as links on the page need it; None leaves them out.
    """
    if not rows:
        return f"# Benchmarks\n\n{NOTHING}\n"
    parts = ["# Benchmarks", "Made by `cogvx-fast bench report` from `benchmarks/results`.", _LEGEND]
    for group in groups(rows):
        parts += [f"## {group.title}", provenance(group), _table(group, groups(rows))]
        if plots is not None and not group.is_sizes:
            parts.append(_image(group, plots))
        parts.append(_details(group))
    return "\n\n".join(parts) + "\n"


def readme_section(rows: Sequence[Row], plots: str, page: str) -> str:
    """What stands between the markers: all at a glance, recipes with their plot; or that nothing has been measured.

    Args:
        plots, page: folder of the plots and the page of `report`, as links in the README need them.
    """
    found = groups(rows)
    if not found:
        return NOTHING
    parts = [summary(found)]
    for group in found:
        if group.is_quality:
            parts += [f"**{group.title}**: {provenance(group)}", tradeoff.table(group, found), _image(group, plots)]
    parts.append(
        f"From [all rows]({page}), with spread, other contenders, ablations, sizes and how each was measured. Times"
        " are medians of contenders that alternated in one run, or one call where that takes minutes; *memory* is a"
        " call's peak on top of the weights; *error* is a multiple of diffusers' own at that precision, and above 1.1"
        " the speed is refused."
    )
    return "\n\n".join(filter(None, parts))


def with_section(text: str, section: str) -> str:
    """`text` with `section` between the markers.

    Raises:
        ValueError: if the markers are not there exactly once and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"needs one line {BEGIN} and after it one line {END}, between which the section goes")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def rewrite_readme(path: str | Path, section: str) -> bool:
    """Put `section` into the file, whole or not at all; says whether that changed it.

    Raises:
        ValueError: as in `with_section`, naming the file.
    """
    path = Path(path)
    text, new = _read_with_markers(path, section)
    if new != text:
        write_whole(path, new.encode())
    return new != text


def readme_matches(path: str | Path, section: str) -> bool:
    """Whether the file has exactly `section` between its markers.

    Raises:
        ValueError: as in `with_section`, naming the file.
    """
    text, new = _read_with_markers(Path(path), section)
    return text == new


def _read_with_markers(path: Path, section: str) -> tuple[str, str]:
    text = path.read_text(encoding="utf-8")
    try:
        return text, with_section(text, section)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None


def _table(group: Group, others: Sequence[Group]) -> str:
    if group.is_sizes:
        return sizes_table(group)
    return tradeoff.table(group, others) if group.is_quality else table(group)


def provenance(group: Group) -> str:
    """Where a group's rows come from, in a sentence."""
    row, origin = group.first, group.first.provenance
    shape = row.shapes
    parts = [
        origin.device_name,
        f"{origin.threads} threads" if origin.cuda is None else f"power limit {origin.cuda.get('power_limit_watts')} W",
        *([row.measures] if group.is_quality else _sizes(shape)),
        f"torch {origin.versions.get('torch')}, diffusers {origin.versions.get('diffusers')}",
        _commit(row),
        row.time[:10],
    ]
    return "; ".join(parts) + f". `{row.command}`"


def _sizes(shape: dict) -> list[str]:
    layers, of = shape.get("layers"), shape.get("layers_of_the_real_model")
    return [
        f"{layers} of {of} layers" if layers != of else f"{layers} layers",
        f"batch {shape.get('batch')}, {shape.get('num_frames')} frames of {shape.get('height')}x{shape.get('width')} "
        f"({shape.get('tokens'):,} tokens)",
    ]


def table(group: Group) -> str:
    """The group's rows as a Markdown table."""
    columns = ["stage", "contender", "time"]
    columns += ["x the row before", "expected"] if group.is_ablation else []
    columns += ["x diffusers", "x arithmetic"]
    columns += ["first call", "pays after", "peak memory"]
    columns += ["error (x diffusers' own)"]
    lines = [columns, ["---"] * len(columns)]
    for row in group.rows:
        cells = _cells(row, group)
        lines.append([cells[column] for column in columns])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sizes_table(group: Group) -> str:
    """What each recipe takes on disk and in memory, as a Markdown table; beside it what was predicted."""
    columns = [
        "contender",
        "on disk",
        "loading: peak (predicted)",
        "running: peak (predicted)",
        "off",
        "glibc's own way",
    ]
    lines = [columns, ["---"] * len(columns)]
    for row in group.rows:
        found = {name.removesuffix("_bytes"): size(value) for name, value in row.extras.items()}
        lines.append(
            [
                row.contender,
                found["disk"],
                f"{found['loading_peak']} ({found['loading_predicted']})",
                f"{found['running_peak']} ({found['running_predicted']})",
                f"{row.extras['running_peak_bytes'] / row.extras['running_predicted_bytes'] - 1:+.1%}",
                found["running_peak_keeping"],
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: Row, group: Group) -> dict[str, str]:
    if row.gate == "red":
        time = f"refused: {row.gate_detail}"
    else:
        spread = f"{seconds(row.p20_seconds)} to {seconds(row.p80_seconds)}" if row.n > 1 else "one call"
        time = f"{seconds(row.p50_seconds)} ({spread})"
    return {
        "stage": row.stage,
        "contender": row.contender,
        "time": time.replace("|", "\\|"),
        "x the row before": _times(over_previous(row, group)),
        "expected": _times(row.expected_gain, digits=3),
        "x diffusers": _times(speedup(row, group)),
        "x arithmetic": _times(over_bound(row, group)),
        "first call": seconds(row.first_call_seconds),
        "pays after": _calls(break_even(row, group)),
        "peak memory": size(row.peak_memory_bytes),
        "error (x diffusers' own)": _error(row),
    }


def _details(group: Group) -> str:
    """What the rows of a group measure, which engine they ran, and what else they say."""
    lines = []
    for row in group.rows:
        extras = ", ".join(f"{name} {value:.4g}" for name, value in row.extras.items())
        said = [row.measures, *row.engine_report, extras, f"expected: {row.expected_why}" if row.expected_why else ""]
        lines.append(f"- **{row.stage}, {row.contender}**: {'; '.join(part for part in said if part)}")
    return "<details><summary>What was measured</summary>\n\n" + "\n".join(lines) + "\n\n</details>"


def _image(group: Group, plots: str) -> str:
    return f"![{group.title}]({plots}/{group.slug}.png)"


def _commit(row: Row) -> str:
    commit, dirty = row.provenance.git_commit, row.provenance.git_dirty
    if commit is None:
        return "no commit known"
    return f"commit {commit[:10]}" + (" with changes" if dirty else "")


def _times(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}x"


def _calls(value: float | None) -> str:
    return "" if value is None else "never" if math.isinf(value) else f"{value:,.0f} calls"


def _error(row: Row) -> str:
    if row.error is None:
        return ""
    ratio = f" ({row.error / row.own_error:.2f}x)" if row.own_error else ""
    return f"{row.error:.2g}{ratio}"
