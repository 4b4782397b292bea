import dataclasses
import json

import pytest

from cogvx_fast.bench import rows
from cogvx_fast.bench.rows import Row, RowError

from .conftest import refused, row


def changed(**changes):
    values = {**json.loads(row().to_json()), **changes}
    return json.dumps({name: value for name, value in values.items() if value is not ...})


def test_rows_come_back_as_they_were(tmp_path):
    file = tmp_path / "new" / "rows.jsonl"
    written = [row(), refused(), row("diffusers", engine=None, gate="none", error=None, own_error=None, budget=None)]
    for one in written:
        rows.append(file, one)
    assert rows.read(file) == written
    assert file.read_bytes().endswith(b"}\n") and file.read_text().count("\n") == 3


def test_a_folder_is_read_in_the_order_of_time(tmp_path):
    for name, day in (("a", 9), ("b", 3), ("a", 1)):
        rows.append(tmp_path / f"{name}.jsonl", row(time=f"2026-01-0{day}T00:00:00+00:00"))
    (tmp_path / ".gitkeep").touch()
    assert [one.time[9] for one in rows.read(tmp_path)] == ["1", "3", "9"]


def test_rows_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        row().p50_seconds = 0.1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "no JSON"),
        ("[]", "a row is a JSON object"),
        (changed(schema=2), "schema=2: this version reads and writes schema 1"),
        (changed(schema=...), "schema=None"),
        (changed(speed=1.0), r"unknown fields \['speed'\]"),
        (changed(gate=...), r"missing fields \['gate'\]"),
        (changed(provenance={}), "Provenance: missing fields"),
        (changed(provenance=None), "provenance must be an object"),
        (changed(p50_seconds="fast"), "p50_seconds='fast' must be float"),
        (changed(n=True), "n=True must be int"),
        (changed(gate="grey"), "gate='grey' must be one of green, red, none"),
        (changed(series="other"), "series='other' must be one of"),
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


def test_a_bad_line_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows.append(file, row())
    with file.open("a") as broken:
        broken.write('{"half": ')
    with pytest.raises(RowError, match=r"rows\.jsonl:2: no JSON"):
        rows.read(file)


def test_a_row_that_does_not_fit_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    rows.append(file, row())
    before = file.read_bytes()
    original = type(file).open

    def short(self, *args, **kwargs):
        opened = original(self, *args, **kwargs)

        class Full:
            def __getattr__(self, name):
                return getattr(opened, name)

            def __enter__(self):
                return self

            def __exit__(self, *reason):
                opened.close()

            def write(self, data):
                return opened.write(data[:10])

        return Full()

    monkeypatch.setattr(type(file), "open", short)
    with pytest.raises(OSError, match="could not be written whole"):
        rows.append(file, row())
    monkeypatch.undo()
    assert file.read_bytes() == before
