"""A result row is one measurement as one line of JSON: its fields, and what every row must keep."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from .provenance import Provenance

# 2: `gpu_state`. Older rows are read as of the newest schema, with what they do not have left empty.
SCHEMA = 2
_NEW_SINCE: dict[int, dict[str, Any]] = {1: {"gpu_state": None}}
MIN_RUNS = 5
# none: a bound, which computes no result that could be judged; lossy: another result by design, its distance stated.
GATES = ("green", "red", "none", "lossy")
_SPEEDS = ("p20_seconds", "p50_seconds", "p80_seconds", "first_call_seconds", "peak_memory_bytes")


class RowError(ValueError):
    """A row that does not keep the schema or the rules of its series; the message says which field and why."""


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat("T", "milliseconds")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender in one stage of one workload. What may be left out stands in the file nevertheless.

    Attributes:
        run: the same for all rows of one run; only those may be compared as ratios.
        series: name of one of `results.SERIES`, whose class says what such a row must state.
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
        gpu_state: clocks, power and temperature of the GPU during the timed calls, see `gpu.Watch.state`; None where
            there is none, and where it was not looked at.
        extras: more numbers, the unit in the name.
        expected_gain, expected_why: of an ablation: the factor over the row before that was expected, and from what.
        time: when the row was made, UTC, ISO 8601.
    """

    run: str
    series: str
    workload: str
    stage: str
    measures: str
    shapes: dict[str, Any]
    dtype: str
    contender: str
    engine: dict[str, Any] | None = None
    engine_report: list[str] = field(default_factory=list)
    command: str
    gate: str
    gate_detail: str
    reference: str
    error: float | None = None
    own_error: float | None = None
    budget: float | None = None
    n: int = 0
    p20_seconds: float | None = None
    p50_seconds: float | None = None
    p80_seconds: float | None = None
    first_call_seconds: float | None = None
    peak_memory_bytes: int | None = None
    peak_memory_kind: str = ""
    gpu_state: dict[str, Any] | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    expected_gain: float | None = None
    expected_why: str | None = None
    provenance: Provenance
    time: str = field(default_factory=_now)
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        _check_schema(self.schema)
        _check_types(self)
        if self.gate not in GATES:
            raise RowError(f"gate={self.gate!r} must be one of {', '.join(GATES)}")
        if self.gate == "red":
            self.check_states_no_speed("the gate is red, so no speed may be stated")
        if self.gate == "green" and not (
            self.error is not None and self.budget is not None and self.error <= self.budget
        ):
            raise RowError(f"the gate is green, but error={self.error} is not within budget={self.budget}")
        if (self.p20_seconds, self.p50_seconds, self.p80_seconds) != (None, None, None):
            self.check_states_times()

    def check_states_no_speed(self, why: str) -> None:
        """Raise a RowError that says why if a time or a memory is stated."""
        stated = [name for name in _SPEEDS if getattr(self, name) is not None]
        if stated:
            raise RowError(f"{why}: {', '.join(stated)} must be empty")

    def check_states_times(self) -> None:
        """Raise a RowError if the percentiles are not all there and in order, of enough calls."""
        p20, p50, p80 = self.p20_seconds, self.p50_seconds, self.p80_seconds
        if p20 is None or p50 is None or p80 is None or not 0 < p20 <= p50 <= p80:
            raise RowError(f"p20, p50, p80 of {p20}, {p50}, {p80} seconds must be positive and in order")
        if self.n < MIN_RUNS and self.n != 1:
            raise RowError(f"n={self.n}: a median needs at least {MIN_RUNS} runs; a single call is stated as one")

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
        except (ValueError, RecursionError) as error:  # also for numbers too long to read, and lists in lists in lists
            raise RowError(f"no JSON: {error}") from None
        if not isinstance(values, dict):
            raise RowError(f"a row is a JSON object, not {line[:40]!r}")
        values = _upgraded(values)
        _check_names(cls, values)
        if not isinstance(values["provenance"], dict):
            raise RowError("provenance must be an object")
        _check_names(Provenance, values["provenance"])
        provenance = Provenance(**values["provenance"])
        _check_types(provenance)
        return cls(**{**values, "provenance": provenance})


def _check_schema(schema: object) -> None:
    if schema != SCHEMA:
        known = ", ".join(map(str, (*_NEW_SINCE, SCHEMA)))
        raise RowError(f"schema={schema!r}: this version reads schemas {known} and writes {SCHEMA}")


def _upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """A row of this schema or an older one as one of this."""
    schema = values.get("schema")
    if not isinstance(schema, int) or schema not in _NEW_SINCE:
        _check_schema(schema)
        return values
    for older, fields in _NEW_SINCE.items():
        if schema <= older:
            values = {**fields, **values}
    return {**values, "schema": SCHEMA}


def _check_names(cls: type[Row] | type[Provenance], values: dict[str, Any]) -> None:
    names = {field.name for field in dataclasses.fields(cls)}
    missing, unknown = sorted(names - set(values)), sorted(set(values) - names)
    if missing or unknown:
        raise RowError(f"{cls.__name__}: missing fields {missing}, unknown fields {unknown}")


def _check_types(instance: Row | Provenance) -> None:
    hints = typing.get_type_hints(type(instance))
    for one in dataclasses.fields(instance):
        value, hint = getattr(instance, one.name), hints[one.name]
        if not isinstance(value, _classes(hint)) or (isinstance(value, bool) and hint is int):
            raise RowError(f"{one.name}={value!r} must be {getattr(hint, '__name__', hint)}")
        _check_content(one.name, value)


def _check_content(name: str, value: object) -> None:
    """Raise a RowError for numbers and texts that no table and no file can hold, however deep they lie in `value`."""
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError(f"{name}={value!r} must be finite")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise RowError(f"{name}={value!r} must be below 2**63")
    if isinstance(value, str) and (value.encode(errors="replace").decode() != value or "\0" in value):
        raise RowError(f"{name}={value!r} must be text without NUL and halves of characters")
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for one in value:
            _check_content(name, one)


def _classes(hint: Any) -> tuple[type, ...]:
    """The classes of a type hint: `dict` of `dict[str, int] | None`, and that of None."""
    alternatives = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return tuple(typing.get_origin(one) or one for one in alternatives)
