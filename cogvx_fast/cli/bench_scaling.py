"""`cogvx-fast bench scaling`: one clip made by several processes, beside one process."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from cogvx_fast.quiet import quiet_imports

from .bench_files import RESULTS, check_out
from .console import OutputError, UsageError, exit_codes, messages, results, say
from .generate import Precision

if TYPE_CHECKING:
    from cogvx_fast.bench.rows import Row

MOST_PROCESSES = 64


def scaling(
    workload: Annotated[str, typer.Argument(metavar="WORKLOAD", help="One that `bench list` shows.")],
    processes: Annotated[int, typer.Option(help="How many make the clip together, on GPUs one each.")] = 2,
    dtype: Annotated[
        Precision | None, typer.Option(help="Precision.", show_default="the first that the workload names")
    ] = None,
    runs: Annotated[int, typer.Option(help="Timed calls of each way, at least 5.")] = 5,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps of a generation.", show_default="the workload's")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="the best there is")] = None,
    toy: Annotated[
        bool, typer.Option("--toy", help="A rehearsal at toy size, on any device: the times say nothing.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="File that the rows are added to.", show_default=f"{RESULTS}/scaling.jsonl")
    ] = None,
) -> None:
    """Time one clip on several processes and on one, in turns, and add a row for each to a file.

    On GPUs each process has one. On a CPU they share the cores that the one has alone: what is above its time is what
    splitting costs. Exits with status 1 if a result is not right: its row states no speed.
    """
    with exit_codes("rows are written when all are measured"):
        from cogvx_fast.bench.scaling import Scaling
        from cogvx_fast.bench.series import Plan

        from . import loading
        from .bench import _workload

        chosen = _workload(workload, steps, toy)
        if not 2 <= processes <= MOST_PROCESSES:
            raise UsageError("--processes", processes, f"must be 2 to {MOST_PROCESSES}")
        if runs < 5:
            raise UsageError("--runs", runs, "must be at least 5: a median of fewer says little")
        chosen_device = loading.choose_device(device)
        if chosen_device.startswith("cuda"):
            import torch

            if processes > torch.cuda.device_count():
                raise UsageError("--processes", processes, f"must be at most the {torch.cuda.device_count()} GPUs here")
        try:
            Scaling.check_workload(chosen, chosen_device)
        except ValueError as error:
            raise UsageError("WORKLOAD", repr(workload), str(error)) from None
        path = out or RESULTS / "scaling.jsonl"
        check_out(path)
        precision = chosen.dtypes[0] if dtype is None else dtype.value
        words = ["cogvx-fast", "bench", "scaling", workload, "--processes", str(processes), "--dtype", precision]
        words += ["--runs", str(runs)] if runs != 5 else []
        words += ["--steps", str(steps)] if steps is not None else []
        words += ["--toy"] if toy else []
        plan = Plan(chosen, precision, chosen_device, shlex.join(words), None, runs)
        with quiet_imports(), messages.status(Text(f"{chosen.name}, {precision}")) as status:
            try:
                made = Scaling.measure(plan, processes, _adds_to(path), lambda text: status.update(Text(text)))
            except RuntimeError as error:
                raise OutputError(str(error)) from None
        for row in made:
            say(results, f"{row.stage}, {row.contender}: {Scaling.line(row)}")
        say(results, f"added {len(made)} rows to {path}")
        red = [f"{row.stage} {row.contender}" for row in made if row.gate == "red"]
        if red:
            raise OutputError(f"the correctness gate is red, no speed is stated, for: {'; '.join(red)}")


def _adds_to(path: Path) -> Callable[[Row], None]:
    from cogvx_fast.bench.results import append

    def add(row: Row) -> None:
        append(path, row)

    return add
