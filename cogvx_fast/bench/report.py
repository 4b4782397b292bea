"""Documents made from rows: the page with all tables, the plots, and the README's section between its markers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..files import write_whole
from .comparison import Comparison
from .results import latest
from .rows import Row
from .serving import Serving

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


def report(rows: Sequence[Row], plots: str) -> str:
    """A page in Markdown: the latest run of each workload, dtype and device, with where it comes from.

    Args:
        plots: folder of the plots as links on the page need it.
    """
    if not rows:
        return f"# Benchmarks\n\n{NOTHING}\n"
    parts = ["# Benchmarks", "Made by `cogvx-fast bench report` from `benchmarks/results`.", _LEGEND]
    found = latest(rows)
    glance = Comparison.at_a_glance(found)
    if glance:
        parts += ["## At a glance", glance]
    for series in found:
        parts += [f"## {series.title}", series.origin(), series.table(found), series.image(plots), series.details()]
    return "\n\n".join(filter(None, parts)) + "\n"


def write_plots(rows: Sequence[Row], folder: str | Path) -> list[Path]:
    """Write `<slug>.png` for each series of `rows` that has a plot into `folder`; each whole or not at all.

    Raises:
        ImportError: without matplotlib, which the extra `plots` brings.
        OSError: if a file cannot be written.
    """
    written = []
    found = latest(rows)
    for series in found:
        if series.has_plot:
            path = Path(folder) / f"{series.slug}.png"
            write_whole(path, series.plot(found))
            written.append(path)
    return written


def readme_section(rows: Sequence[Row], page: str) -> str:
    """What stands between the README's markers: a few comparisons; or that nothing has been measured.

    Args:
        page: of `report`, as links in the README need it.
    """
    found = latest(rows)
    if not found:
        return NOTHING
    words = (
        f"From [all rows]({page}): medians of contenders that alternated in one run, or one call where that takes"
        " minutes; *memory* is a call's peak on top of the weights; *error* is a multiple of diffusers' own at that"
        " precision, and above 1.1 the speed is refused. Of several machines the one on which the gain is least."
    )
    return "\n\n".join(filter(None, (Comparison.of_the_readme(found), words)))


def serving_section(rows: Sequence[Row], plots: str) -> str:
    """What stands between the markers of the page about serving: how long people wait, by how many of them come.

    Args:
        plots: folder of the plots as links on that page need it.
    """
    found = [series for series in latest(rows) if isinstance(series, Serving)]
    if not found:
        return NOTHING
    return "\n\n".join(part for one in found for part in (one.origin(), one.table(found), one.image(plots)))


def rewritten(path: str | Path, section: str) -> tuple[str, str]:
    """The text of a file, and what it is with `section` between its markers.

    Raises:
        ValueError: if the markers are not there exactly once and in order; names the file.
        OSError: if it cannot be read.
    """
    text = Path(path).read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path} needs one line {BEGIN} and after it one line {END}, between which the section goes")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return text, f"{before}{BEGIN}\n{section}\n{END}{after}"
