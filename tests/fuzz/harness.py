"""What every fuzz test counts, and the one command that it runs: inputs, videos or values, clear errors, and faults.

A fault is a traceback, a hang, a file that is left, or a result where there should be none; it fails the test with the
input that made it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from hypothesis import settings
from typer.testing import CliRunner

from cogvx_fast.cli import app

SECONDS = 60  # of one input on a machine that does nothing else; what takes longer hangs
SCALE = int(os.environ.get("FUZZ_SCALE", "1"))  # how many times the inputs of the test suite
COUNTS: dict[str, Counter[str]] = {}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command did: its exit status, what it said to standard error, and the files that it left."""

    status: int
    said: str
    files: list[str]


def examples(number: int) -> settings:
    """So many inputs in the test suite."""
    return settings(max_examples=number * SCALE)


def count(what: str, outcome: str) -> None:
    COUNTS.setdefault(what, Counter())[outcome] += 1


def allowed(seconds: float) -> float:
    """What takes so long alone may take longer beside others, by as many as want each core."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """A process that is still at one input after `SECONDS` says where, and ends."""
    faulthandler.dump_traceback_later(allowed(SECONDS), exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def command(what: str, arguments: list[str]) -> Outcome:
    """Run `cogvx-fast` with `arguments` in an empty folder of its own; faults of any command are found here."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, limited():
        os.chdir(folder)
        try:
            result = CliRunner().invoke(app, arguments)
        finally:
            os.chdir(before)
        files = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in (0, 1, 2), result.exit_code
    assert "Traceback" not in result.stderr
    if result.exit_code:
        assert result.output.strip(), "it failed without a word"
        assert not files, f"it failed and left {files}"
    count(what, "done" if result.exit_code == 0 else "clear error")
    return Outcome(result.exit_code, result.stderr, files)
