"""Result files: rows are appended to them, read back, and sorted into the series that they belong to."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

from .ablation import Ablation
from .comparison import Comparison
from .recipes import Quality, Recipes
from .rows import Row, RowError
from .scaling import Scaling
from .series import Series
from .serving import Serving
from .sizes import Sizes
from .skipping import Skipping

# All kinds of series, in the order in which a report has them. To add one, write its class and add it here.
_KINDS = (Comparison, Ablation, Recipes, Quality, Sizes, Skipping, Serving, Scaling)
SERIES: dict[str, type[Series]] = {kind.name: kind for kind in _KINDS}


def series_of(row: Row) -> type[Series]:
    """The class of the row's series, by which the row is checked.

    Raises:
        RowError: if there is no such series, or the row is none of it.
    """
    if row.series not in SERIES:
        raise RowError(f"series={row.series!r} must be one of {', '.join(SERIES)}")
    SERIES[row.series].check(row)
    return SERIES[row.series]


def append(path: str | Path, row: Row) -> None:
    """Add `row` to the file, whole or not at all; the file and its folders are made if they are missing.

    Raises:
        RowError: for a row that is none of its series.
        OSError: if it cannot be written; the file is then as it was.
    """
    series_of(row)
    path = Path(os.path.realpath(path))  # through a link that leads to nothing yet, too
    line = (row.to_json() + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another run may add to the same file
        size = os.fstat(file.fileno()).st_size
        if file.write(line) != len(line):
            file.truncate(size)
            raise OSError(f"{path}: the row could not be written whole (is the disk full?)")


def read(path: str | Path) -> list[Row]:
    """The rows of a file, or of all `*.jsonl` in a folder, in the order in which they were made.

    Raises:
        RowError: for a file that is no text, and a line that is no valid row; names the file and the line.
        OSError: if the file cannot be read.
    """
    path = Path(path)
    rows = []
    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise RowError(f"{file} is not text in UTF-8") from None
        for number, line in enumerate(lines, start=1):
            try:
                row = Row.from_json(line)
                series_of(row)
            except RowError as error:
                raise RowError(f"{file}:{number}: {error}") from None
            rows.append(row)
    return sorted(rows, key=lambda row: row.time)


def latest(rows: Sequence[Row]) -> list[Series]:
    """The latest run of each workload, dtype, device and series, sorted by these; older runs are left out."""
    order = list(SERIES)
    runs: dict[tuple[str, str, str, int], dict[str, list[Row]]] = {}
    for row in rows:
        key = (row.workload, row.dtype, row.provenance.device_name, order.index(row.series))
        runs.setdefault(key, {}).setdefault(row.run, []).append(row)
    newest = (max(of_key.values(), key=lambda run: max(row.time for row in run)) for _, of_key in sorted(runs.items()))
    return [series_of(run[0])(run) for run in newest]
