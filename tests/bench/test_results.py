"""Files of rows: what is added to them, what is read and refused, and into which series the rows fall."""

import pytest

from cogvx_fast.bench.results import SERIES, append, latest, read
from cogvx_fast.bench.rows import RowError

from .conftest import refused, row


def test_rows_come_back_as_they_were(tmp_path):
    file = tmp_path / "new" / "rows.jsonl"
    written = [row(), refused(), row("diffusers", engine=None, gate="none", error=None, own_error=None, budget=None)]
    for one in written:
        append(file, one)
    assert read(file) == written
    assert file.read_bytes().endswith(b"}\n") and file.read_text().count("\n") == 3


def test_a_folder_is_read_in_the_order_of_time(tmp_path):
    for name, day in (("a", 9), ("b", 3), ("a", 1)):
        append(tmp_path / f"{name}.jsonl", row(time=f"2026-01-0{day}T00:00:00+00:00"))
    (tmp_path / ".gitkeep").touch()
    assert [one.time[9] for one in read(tmp_path)] == ["1", "3", "9"]


def test_a_bad_line_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    append(file, row())
    with file.open("a") as broken:
        broken.write('{"half": ')
    with pytest.raises(RowError, match=r"rows\.jsonl:2: no JSON"):
        read(file)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (row(series="other"), "series='other' must be one of contenders, ablation, recipes, quality, sizes"),
        (row(series="quality"), "a row of quality has n and extras, and no times"),
        (refused(n=5), "the gate is red, so no speed may be stated"),
    ],
)
def test_a_row_that_is_none_of_its_series_is_neither_written_nor_read(tmp_path, wrong, message):
    file = tmp_path / "rows.jsonl"
    with pytest.raises(RowError, match=message):
        append(file, wrong)
    assert not file.exists()
    file.write_text(wrong.to_json() + "\n")
    with pytest.raises(RowError, match=rf"rows\.jsonl:1: {message}"):
        read(file)


def test_a_file_that_is_no_text_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(bytes(range(256)))
    with pytest.raises(RowError, match=r"rows\.jsonl is not text in UTF-8"):
        read(file)
    for line in ("[" * 100_000, '{"n": ' + "9" * 5000 + "}", '{"schema": []}', '{"schema": {}}'):
        file.write_text(line)
        with pytest.raises(RowError, match=r"rows\.jsonl:1: (no JSON|schema=)"):
            read(file)


@pytest.mark.parametrize("value", ["\ud800", "a\0b", 10**309, float("inf"), ["\ud800"], {"\ud800": 1}])
def test_what_no_table_can_hold_is_refused(value):
    with pytest.raises(RowError, match=r"extras=.* must be"):
        row(extras={"a": value})


def test_the_latest_run_of_each_workload_and_dtype():
    old = row(run="a", time="2026-01-01T00:00:00+00:00")
    new = [row(name, run="b", time="2026-01-02T00:00:00+00:00") for name in ("diffusers", "ours")]
    other = row(run="c", dtype="float32")
    additions = row(run="d", series="ablation")
    found = latest([old, other, *new, additions])
    assert [one.title for one in found] == ["dit-2b, bfloat16", "dit-2b, bfloat16, ablation", "dit-2b, float32"]
    assert [type(one) for one in found] == [SERIES["contenders"], SERIES["ablation"], SERIES["contenders"]]
    assert found[0].rows == new
    assert found[1].slug == "dit-2b-bfloat16-ablation-some-cpu-r"


def test_a_row_that_does_not_fit_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    append(file, row())
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
        append(file, row())
    monkeypatch.undo()
    assert file.read_bytes() == before
