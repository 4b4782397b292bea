"""`cogvx-fast bench`: measure the engine beside diffusers, and make tables and plots of what was measured."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from cogvx_fast.quiet import quiet_imports

from .bench_files import RESULTS, check_out, read_rows
from .console import OutputError, UsageError, exit_codes, messages, results, say
from .generate import Precision

if TYPE_CHECKING:
    from cogvx_fast.bench.contenders import Contender
    from cogvx_fast.bench.rows import Row
    from cogvx_fast.bench.series import Plan, Series
    from cogvx_fast.bench.workloads import Workload

app = typer.Typer(help="Measure the engine beside diffusers.", no_args_is_help=True)


@app.command("list")
def list_all() -> None:
    """Show the workloads and the contenders."""
    with exit_codes():
        from rich.table import Table

        from cogvx_fast.bench.comparison import Comparison
        from cogvx_fast.bench.workloads import WORKLOADS

        table = Table("workload", "what", "stages", "dtypes", title="Workloads", title_justify="left")
        for workload in WORKLOADS.values():
            needs = f" (needs CUDA: {workload.needs_cuda})" if workload.needs_cuda else ""
            table.add_row(
                workload.name, workload.summary + needs, ", ".join(workload.stages), ", ".join(workload.dtypes)
            )
        results.print(table)
        table = Table("contender", "what", "stages", title="Contenders", title_justify="left")
        for name, contender in _choices(Comparison).items():
            where = f" (on {' and '.join(contender.devices)} only)" if contender.devices else ""
            table.add_row(name, contender.what + where, ", ".join(contender.stages))
        results.print(table)


@app.command("run")
def run(
    workload: Annotated[str, typer.Argument(metavar="WORKLOAD", help="One that `bench list` shows.")],
    dtype: Annotated[
        Precision | None, typer.Option(help="Precision.", show_default="all that the workload names")
    ] = None,
    contenders: Annotated[
        str | None, typer.Option(help="What to time, names with commas between them.", show_default="all")
    ] = None,
    ablation: Annotated[
        bool,
        typer.Option("--ablation", help="Instead of contenders: the engine with one optimization more in each row."),
    ] = False,
    recipes: Annotated[bool, typer.Option("--recipes", help="Compare the quantization recipes with exact.")] = False,
    sizes: Annotated[
        bool,
        typer.Option("--sizes", help="Instead of times: bytes on disk and in memory by recipe, and as predicted."),
    ] = False,
    runs: Annotated[int, typer.Option(help="Timed calls of each contender, at least 5.")] = 5,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps of a generation.", show_default="the workload's")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1.", show_default="the best there is")] = None,
    toy: Annotated[
        bool, typer.Option("--toy", help="A rehearsal at toy size, on any device: the times say nothing.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="File that the rows are added to.", show_default=f"{RESULTS}/WORKLOAD.jsonl"),
    ] = None,
) -> None:
    """Time the engine and others in turns, and add a row for each to a file. Their output is checked first.

    Exits with status 1 if the correctness gate of any contender is red: its row states no speed.
    """
    with exit_codes("rows of the stages that were finished are kept"):
        from cogvx_fast.bench.series import Plan

        from . import loading

        chosen = _workload(workload, steps, toy)
        series = _series(ablation, recipes, sizes)
        names = _contender_names(contenders, series)
        if runs < 5:
            raise UsageError("--runs", runs, "must be at least 5: a median of fewer says little")
        chosen_device = loading.choose_device(device)
        try:
            series.check_workload(chosen, chosen_device)
        except ValueError as error:
            raise UsageError("WORKLOAD", repr(workload), str(error)) from None
        path = out or RESULTS / f"{chosen.name}.jsonl"
        check_out(path)
        options = {"--contenders": contenders, "--runs": runs, "--steps": steps, "--device": chosen_device}
        made = []
        for precision in [dtype.value] if dtype is not None else chosen.dtypes:
            words = ["cogvx-fast", "bench", "run", workload, "--dtype", precision]
            words += [str(word) for option, value in options.items() if value is not None for word in (option, value)]
            words += [f"--{series.label}"] if series.label else []
            words += ["--toy"] if toy else []
            made += _run(series, Plan(chosen, precision, chosen_device, shlex.join(words), names, runs), path)
        say(results, f"added {len(made)} rows to {path}")
        red = [f"{row.dtype} {row.stage} {row.contender}" for row in made if row.gate == "red"]
        if red:
            raise OutputError(f"the correctness gate is red, no speed is stated, for: {'; '.join(red)}")


@app.command("report")
def report(
    folder: Annotated[Path, typer.Option("--results", help="File or folder of rows.")] = RESULTS,
    page: Annotated[Path, typer.Option(help="The page with all tables.")] = Path("docs/benchmarks.md"),
    plots: Annotated[Path, typer.Option(help="Folder of the plots.")] = Path("docs/benchmarks"),
    readme: Annotated[Path, typer.Option(help="File whose section is rewritten.")] = Path("README.md"),
    serving: Annotated[
        Path, typer.Option(help="File whose section about servers is rewritten, where there are rows of them.")
    ] = Path("docs/serving.md"),
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with status 1 if a section is out of date.")
    ] = False,
) -> None:
    """Make the page, the plots and the README's section from the rows."""
    with exit_codes("files that were finished are kept, nothing partial is left"):
        from cogvx_fast.bench import report as made
        from cogvx_fast.bench.serving import Serving
        from cogvx_fast.files import write_whole

        rows = read_rows(folder)
        try:
            tables = made.report(rows, _link(plots, page))
            sections = {("--readme", readme): made.readme_section(rows, _link(page, readme))}
            if any(row.series == Serving.name for row in rows):
                sections["--serving", serving] = made.serving_section(rows, _link(plots, serving))
        except (TypeError, LookupError, ArithmeticError, ValueError) as error:  # shapes or extras that are not theirs
            raise UsageError("--results", repr(str(folder)), f"has a row that no table shows: {error}") from error
        texts = {}
        for (argument, path), section in sections.items():
            try:
                texts[path] = made.rewritten(path, section)  # refused before anything is written
            except (ValueError, OSError) as error:
                why = getattr(error, "strerror", None) or str(error)
                raise UsageError(argument, repr(str(path)), why) from None
        if check:
            for path, (text, new) in texts.items():
                if text != new:
                    raise OutputError(f"{path} does not match the rows; run: cogvx-fast bench report")
            say(results, f"{' and '.join(map(str, texts))} match{'es' * (len(texts) == 1)} {len(rows)} rows")
            return
        try:
            pictures = _write_plots(rows, plots)
            write_whole(page, tables.encode())
            for path, (text, new) in texts.items():
                if text != new:
                    write_whole(path, new.encode())
        except OSError as error:
            raise OutputError(f"{error.filename} could not be written: {error.strerror}") from error
        written = ", ".join(map(str, (page, *texts)))
        say(results, f"wrote {written} and {len(pictures)} plots from {len(rows)} rows")


def _workload(name: str, steps: int | None, toy: bool) -> Workload:
    from cogvx_fast.bench.workloads import WORKLOADS

    if name not in WORKLOADS:
        raise UsageError("WORKLOAD", repr(name), f"is unknown; allowed: {', '.join(WORKLOADS)}")
    if WORKLOADS[name].checkpoint is not None:
        try:
            WORKLOADS[name].checkpoint_path()
        except FileNotFoundError as error:
            raise UsageError("WORKLOAD", repr(name), str(error)) from None
    try:
        chosen = WORKLOADS[name].rehearsal() if toy else WORKLOADS[name]
    except ValueError as error:
        raise UsageError("--toy", None, str(error)) from None
    if steps is None:
        return chosen
    if steps < 1:
        raise UsageError("--steps", steps, "must be at least 1")
    return dataclasses.replace(chosen, steps=steps)


def _series(ablation: bool, recipes: bool, sizes: bool) -> type[Series]:
    """Which series the rows are of."""
    from cogvx_fast.bench.results import SERIES

    given = [name for name, on in (("ablation", ablation), ("sizes", sizes), ("recipes", recipes)) if on]
    if len(given) > 1:
        raise UsageError(f"--{given[1]}", None, f"cannot be combined with --{given[0]}")
    return SERIES[given[0] if given else "contenders"]


def _contender_names(asked: str | None, series: type[Series]) -> list[str] | None:
    """The names that were asked for, checked; None: all of the series."""
    if asked is None:
        return None
    known = _choices(series)
    if not known:
        raise UsageError("--contenders", repr(asked), f"cannot be combined with --{series.label}, which has its own")
    names = [name.strip() for name in asked.split(",")]
    for name in names:
        if name not in known:
            raise UsageError("--contenders", repr(name), f"is unknown; allowed: {', '.join(known)}")
    return names


def _choices(series: type[Series]) -> Mapping[str, Contender]:
    with messages.status("loading torch and diffusers"), quiet_imports():
        return series.choices()


def _run(series: type[Series], plan: Plan, out: Path) -> list[Row]:
    from cogvx_fast.bench.results import append

    with quiet_imports():
        import cogvx_fast.bench.runner  # noqa: F401 - with the engine, before anything is said

    from . import loading

    try:
        left_out = series.left_out(plan)
    except ValueError as error:
        raise UsageError("--contenders", repr(",".join(plan.contenders or ())), str(error)) from None
    for why in dict.fromkeys(left_out.values()):
        names = ", ".join(name for name, reason in left_out.items() if reason == why)
        say(results, f"{plan.workload.name} {plan.dtype} without {names}: {why}")
    head = f"{plan.workload.name} {plan.dtype}"
    with loading.quiet_libraries(), messages.status(Text(head)) as status:

        def sink(row: Row) -> None:
            try:
                append(out, row)
            except OSError as error:
                raise OutputError(f"{out}: the row could not be added: {error}") from error
            of = f"{row.workload} {row.dtype} {row.stage:<10} {row.contender:<24}"
            say(results, f"{of} {series.line(row)}")

        made = series.run(plan, sink, lambda text: status.update(Text(f"{head} {text}")))
    for line in series(made).remarks() if made else []:
        say(results, line)
    return made


def _write_plots(rows: list[Row], folder: Path) -> list[Path]:
    from cogvx_fast.bench.report import write_plots

    try:
        with messages.status("drawing"):
            return write_plots(rows, folder)
    except ImportError:
        raise UsageError("--plots", None, 'needs matplotlib: pip install "cogvx_fast[plots]"') from None


def _link(target: Path, page: Path) -> str:
    return Path(os.path.relpath(target, page.parent)).as_posix()
