"""One measurement as one line of JSON: what a row holds, how it is checked, appended and read back."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .provenance import Provenance

SCHEMA = 1
MIN_RUNS = 5
# none: a bound, which computes no result that could be judged; lossy: another result by design, its distance stated.
GATES = ("green", "red", "none", "lossy")
SERIES = ("contenders", "ablation", "recipes", "quality", "sizes")
_SPEEDS = ("p20_seconds", "p50_seconds", "p80_seconds", "first_call_seconds", "peak_memory_bytes")


class RowError(ValueError):
    """A row that does not keep the schema; the message says which field and why."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender in one stage of one workload.

    Attributes:
        run: the same for all rows of one run; only those may be compared as ratios.
        series: "contenders"; "ablation", where each row adds one optimization to the one before; "recipes", which may
            lose precision down to a floor; "quality", which states distances and readings of videos in extras, of `n`
            of them, and no times; or "sizes", likewise of bytes on disk and in memory, with the distance of what was
            predicted as the error.
        measures: in words, what one measured call is.
        shapes: layers, batch, frames, pixels, tokens and the like.
        engine: the fields of the `EngineConfig` as resolved; None for a contender that is not ours.
        engine_report: what the engine says it did, a line each.
        command: that makes such rows again.
        gate: one of `GATES`; a red row holds no speed and no memory.
        reference: whose output counts as the truth, and in which precision.
        error, own_error, budget: relative error of this contender, of diffusers at this precision, and what is allowed.
        n: how many calls were timed; the percentiles are of these, in seconds. One where a call takes minutes.
        first_call_seconds: the first call in this stage; what compiles, compiles in it, from a cold cache. The process
            is warm: diffusers, eager, has run in it before.
        peak_memory_bytes: as `peak_memory_kind` says in words.
        extras: more numbers, the unit in the name.
        expected_gain, expected_why: of an ablation: the factor over the row before that was expected, and from what.
        time: when the row was made, UTC, ISO 8601.
    """

    run: str
    series: str
    workload: str
    stage: str
    measures: str
    shapes: dict
    dtype: str
    contender: str
    engine: dict | None
    engine_report: list
    command: str
    gate: str
    gate_detail: str
    reference: str
    error: float | None
    own_error: float | None
    budget: float | None
    n: int
    p20_seconds: float | None
    p50_seconds: float | None
    p80_seconds: float | None
    first_call_seconds: float | None
    peak_memory_bytes: int | None
    peak_memory_kind: str
    extras: dict
    expected_gain: float | None
    expected_why: str | None
    provenance: Provenance
    time: str
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise RowError(f"schema={self.schema!r}: this version reads and writes schema {SCHEMA}")
        _check_types(self)
        for name, allowed in (("gate", GATES), ("series", SERIES)):
            if getattr(self, name) not in allowed:
                raise RowError(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}")
        if self.series in ("quality", "sizes"):
            self._check_extras()
        elif self.gate == "red":
            self._check_refused()
        else:
            self._check_times()

    def _check_extras(self) -> None:
        stated = [name for name in _SPEEDS if getattr(self, name) is not None]
        if stated or self.n < 1 or not self.extras:
            raise RowError(
                f"a row of {self.series} has n and extras, and no times: {', '.join(stated) or 'n or extras'}"
            )
        if self.gate == "green" and not (self.error is not None and self.error <= (self.budget or 0)):
            raise RowError(f"the gate is green, but error={self.error} is not within budget={self.budget}")

    def _check_refused(self) -> None:
        stated = [name for name in _SPEEDS if getattr(self, name) is not None]
        if stated or self.n or self.extras:
            raise RowError(
                f"the gate is red, so no speed may be stated: {', '.join(stated) or 'n or extras'} must be empty"
            )

    def _check_times(self) -> None:
        times = (self.p20_seconds, self.p50_seconds, self.p80_seconds)
        if None in times or not 0 < times[0] <= times[1] <= times[2]:
            raise RowError(f"p20, p50, p80 of {times} seconds must be positive and in order")
        if self.n < MIN_RUNS and self.n != 1:
            raise RowError(f"n={self.n}: a median needs at least {MIN_RUNS} runs; a single call is stated as one")
        if self.gate == "green" and not (
            self.error is not None and self.budget is not None and self.error <= self.budget
        ):
            raise RowError(f"the gate is green, but error={self.error} is not within budget={self.budget}")

    def to_json(self) -> str:
        """One line of JSON without its end."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Row:
        """The row of one line.

        Raises:
            RowError: for what is no JSON object, another schema, missing or unknown fields, and wrong values.
        """
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise RowError(f"no JSON: {error}") from None
        if not isinstance(values, dict):
            raise RowError(f"a row is a JSON object, not {line[:40]!r}")
        if values.get("schema") != SCHEMA:
            raise RowError(f"schema={values.get('schema')!r}: this version reads and writes schema {SCHEMA}")
        _check_names(cls, values)
        if not isinstance(values["provenance"], dict):
            raise RowError("provenance must be an object")
        _check_names(Provenance, values["provenance"])
        provenance = Provenance(**values["provenance"])
        _check_types(provenance)
        return cls(**{**values, "provenance": provenance})


def append(path: str | Path, row: Row) -> None:
    """Add `row` to the file, whole or not at all; the file and its folders are made if they are missing.

    Raises:
        OSError: if it cannot be written; the file is then as it was.
    """
    path = Path(path)
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
        RowError: for a line that is no valid row; names the file and the line.
        OSError: if the file cannot be read.
    """
    path = Path(path)
    rows = []
    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                rows.append(Row.from_json(line))
            except RowError as error:
                raise RowError(f"{file}:{number}: {error}") from None
    return sorted(rows, key=lambda row: row.time)


def _check_names(cls: type, values: dict[str, Any]) -> None:
    names = {field.name for field in dataclasses.fields(cls)}
    missing, unknown = sorted(names - set(values)), sorted(set(values) - names)
    if missing or unknown:
        raise RowError(f"{cls.__name__}: missing fields {missing}, unknown fields {unknown}")


def _check_types(instance: Any) -> None:
    hints = typing.get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        value, hint = getattr(instance, field.name), hints[field.name]
        if not isinstance(value, hint) or (isinstance(value, bool) and hint is int):
            raise RowError(f"{field.name}={value!r} must be {getattr(hint, '__name__', hint)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise RowError(f"{field.name}={value!r} must be finite")
