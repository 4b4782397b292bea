"""Names that no file system takes: every option of every command that may name a file says so in a line."""

import typing
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cogvx_fast.cli import app, bench, bench_serve, calibrate, generate, quantize, serve, ui

LONG = "a" * 300
# Of each command its function, and what it needs beside the option to come to look at it.
COMMANDS = {
    "generate": (generate.generate, ["a cat"]),
    "quantize": (quantize.quantize, ["model", "out"]),
    "calibrate": (calibrate.calibrate, ["model"]),
    "serve": (serve.serve, []),
    "ui": (ui.ui, []),
    "bench run": (bench.run, ["demo"]),
    "bench serve": (bench_serve.serve, []),
}
TEXTS = {"model", "lora", "schedule", "store", "files"}  # that may name a file though they are no paths


def options():
    """Of each command the options that may name a file."""
    for name, (function, _) in COMMANDS.items():
        for parameter, hint in typing.get_type_hints(function, include_extras=True).items():
            kind, *notes = typing.get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
            parts = [part for each in typing.get_args(kind) for part in typing.get_args(each)]
            kinds = {kind, *typing.get_args(kind), *parts}
            is_path = Path in kinds or (str in kinds and parameter in TEXTS)
            if is_path and any(isinstance(note, typer.models.OptionInfo) for note in notes):
                names = [text for note in notes for text in note.param_decls or () if text.startswith("--")]
                yield name, names[0] if names else f"--{parameter.replace('_', '-')}"


def test_the_options_are_found():
    found = set(options())
    assert {("generate", "--lora"), ("generate", "--sheet"), ("bench serve", "--baseline")} <= found
    assert ("generate", "--steps") not in found


@pytest.mark.parametrize(("command", "option"), list(options()))
def test_a_name_that_is_too_long(command, option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in (LONG, f"folder/{LONG}", f"{LONG}:0.5"):
        result = CliRunner().invoke(app, [*command.split(), *COMMANDS[command][1], option, value])
        assert result.exception is None or isinstance(result.exception, SystemExit), (value, result.exception)
        assert result.exit_code in (1, 2), (value, result.output)
    if command not in ("serve", "ui"):  # whose own folder is made first
        assert not list(tmp_path.iterdir())
