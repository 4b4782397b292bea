"""What a row must keep, and that it comes back as it was written."""

import dataclasses
import json

import pytest

from cogvx_fast.bench.rows import Row, RowError

from .conftest import refused, row


def changed(**changes):
    values = {**json.loads(row().to_json()), **changes}
    return json.dumps({name: value for name, value in values.items() if value is not ...})


def test_a_row_comes_back_as_it_was():
    written = [row(), refused(), row("diffusers", engine=None, gate="none", error=None, own_error=None, budget=None)]
    assert [Row.from_json(one.to_json()) for one in written] == written


def test_a_row_of_the_first_schema_is_read_as_of_this():
    old = changed(schema=1, gpu_state=...)
    assert Row.from_json(old) == row() and json.loads(Row.from_json(old).to_json())["schema"] == 2
    # It had all other fields.
    with pytest.raises(RowError, match=r"missing fields \['gate'\]"):
        Row.from_json(changed(schema=1, gpu_state=..., gate=...))


def test_rows_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        row().p50_seconds = 0.1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "no JSON"),
        ("[]", "a row is a JSON object"),
        (changed(schema=3), "schema=3: this version reads schemas 1, 2 and writes 2"),
        (changed(schema=2, gpu_state=...), r"missing fields \['gpu_state'\]"),
        (changed(schema=...), "schema=None"),
        (changed(speed=1.0), r"unknown fields \['speed'\]"),
        (changed(gate=...), r"missing fields \['gate'\]"),
        (changed(provenance={}), "Provenance: missing fields"),
        (changed(provenance=None), "provenance must be an object"),
        (changed(p50_seconds="fast"), "p50_seconds='fast' must be float"),
        (changed(n=True), "n=True must be int"),
        (changed(gate="grey"), "gate='grey' must be one of green, red, none"),
        (changed(p50_seconds=None), "must be positive and in order"),
        (changed(p20_seconds=0.6), "must be positive and in order"),
        (changed(n=4), "n=4: a median needs at least 5 runs"),
        (changed(error=0.5), "the gate is green, but error=0.5 is not within budget"),
        (changed(gate="red"), "the gate is red, so no speed may be stated"),
    ],
)
def test_what_does_not_keep_the_schema_is_refused(line, message):
    with pytest.raises(RowError, match=message):
        Row.from_json(line)


def test_what_is_not_finite_is_refused():
    with pytest.raises(RowError, match="error=nan must be finite"):
        row(error=float("nan"))
