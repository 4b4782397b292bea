"""The series of scaling: rows of real processes at toy size, and what is refused."""

import dataclasses
import os

import pytest

from cogvx_fast.bench.results import read
from cogvx_fast.bench.rows import RowError
from cogvx_fast.bench.scaling import ALONE, Scaling
from cogvx_fast.bench.series import Plan
from cogvx_fast.bench.workloads import WORKLOADS


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    toy = WORKLOADS["dit-2b-full"].rehearsal()
    return Scaling.measure(Plan(toy, "float32", "cpu", "cogvx-fast bench scaling", None, 5, warmup=1), 2)


@pytest.mark.slow
def test_a_row_for_one_process_and_each_way(rows):
    assert [row.contender for row in rows] == [ALONE, "guidance 2", "ulysses 2"]
    assert [row.extras["processes"] for row in rows] == [1, 2, 2]
    assert all(row.gate == "green" and row.n == 5 and row.error <= row.budget for row in rows)
    assert "sent_bytes_per_step" not in rows[0].extras
    guidance, ulysses = (row.extras["sent_bytes_per_step"] for row in rows[1:])
    assert 0 < guidance < ulysses


@pytest.mark.slow
def test_the_table_and_the_plot(rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(row.to_json() + "\n" for row in rows))
    series = Scaling(read(path))
    table = series.table([])
    assert table.count("\n") == 4 and "| ulysses 2 | 2 |" in table and "| 1.00 |" in table
    assert series.plot([]).startswith(b"\x89PNG")


@pytest.mark.slow
def test_decoding_is_beside_parts_that_know_nothing_of_each_other():
    toy = WORKLOADS["vae-full"].rehearsal()
    plan = Plan(toy, "float32", "cpu", "cogvx-fast bench scaling", None, 5, warmup=0)
    whole, bands, parts = Scaling.measure(plan, 2)
    assert [row.contender for row in (whole, bands, parts)] == [ALONE, "2 bands", "2 parts apart"]
    assert (bands.gate, parts.gate, parts.error) == ("green", "none", None) and parts.p50_seconds > 0
    assert (bands.shapes["height"], parts.shapes["height"]) == (toy.height, toy.height // 2)
    assert (parts.extras["processes"], parts.extras["threads_each"]) == (2, bands.extras["threads_each"])
    assert "| 2 parts apart | 2 |" in Scaling([whole, bands, parts]).table([])


@pytest.mark.slow
def test_a_row_without_times_or_processes_is_none(rows):
    with pytest.raises(RowError, match="has times"):
        Scaling.check(dataclasses.replace(rows[0], p20_seconds=None, p50_seconds=None, p80_seconds=None))
    with pytest.raises(RowError, match="processes and threads_each"):
        Scaling.check(dataclasses.replace(rows[0], extras={}))


def test_workloads_without_such_stages_are_refused():
    with pytest.raises(ValueError, match="has none of the stages"):
        Scaling.check_workload(WORKLOADS["demo-cold"], "cpu")
