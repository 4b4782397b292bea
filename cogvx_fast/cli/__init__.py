"""The command `cogvx-fast`. What a subcommand needs is imported when it runs, so that `--help` answers at once."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from cogvx_fast import __version__

from . import bench, bench_scaling, bench_serve, calibrate, doctor, generate, kernels, quantize, serve, ui
from .console import exit_codes, results, say

app = typer.Typer(
    name="cogvx-fast",
    help="Make videos from text with CogVideoX models.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
app.command()(generate.generate)
app.command()(doctor.doctor)
app.command()(quantize.quantize)
app.command()(calibrate.calibrate)
app.command()(serve.serve)
app.command()(serve.serve_key)
app.command()(ui.ui)
bench.app.command("serve")(bench_serve.serve)
bench.app.command("scaling")(bench_scaling.scaling)
app.add_typer(bench.app, name="bench")
app.add_typer(kernels.app, name="kernels")


def _show_version(wanted: bool) -> None:
    if wanted:
        with exit_codes():
            say(results, f"cogvx-fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command with the arguments of the process."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that a terminal does not know, or of a file's name that is no UTF-8, is no reason to fail.
        sys.stdout.reconfigure(errors="backslashreplace")
    app()
