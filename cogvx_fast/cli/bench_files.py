"""Files of result rows, as the commands are given them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .console import UsageError

if TYPE_CHECKING:
    from cogvx_fast.bench.rows import Row

RESULTS = Path("benchmarks/results")


def check_out(path: Path) -> None:
    """Refuse a file that rows cannot be added to, before hours of measuring."""
    if path.suffix != ".jsonl":
        raise UsageError("--out", repr(str(path)), "must end in .jsonl")
    if os.path.isfile(path):  # also of a name that is too long
        read_rows(path, "--out")
    from cogvx_fast.files import try_place

    place = Path(os.path.realpath(path))  # where a link leads, be it to nothing yet
    try:
        if os.path.lexists(place):
            place.open("ab").close()
        else:
            try_place(place)
    except OSError as error:
        raise UsageError("--out", repr(str(path)), f"cannot be written: {error.strerror}") from None


def read_rows(path: Path, argument: str = "--results") -> list[Row]:
    """The rows of a file or folder; raises a UsageError of `argument` for what holds none."""
    from cogvx_fast.bench.results import read
    from cogvx_fast.bench.rows import RowError

    try:
        return read(path)
    except RowError as error:
        raise UsageError(argument, repr(str(path)), f"has a row that cannot be read: {error}") from None
    except OSError as error:
        raise UsageError(argument, repr(str(path)), f"cannot be read: {error.strerror}") from None
