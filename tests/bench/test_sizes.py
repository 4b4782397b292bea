"""Rows of sizes: measured in processes of their own at a size that tests can afford; what they say and refuse."""

import dataclasses
import sys

import pytest

from cogvx_fast.bench.report import report, write_plots
from cogvx_fast.bench.results import latest
from cogvx_fast.bench.rows import Row, RowError
from cogvx_fast.bench.series import Plan
from cogvx_fast.bench.sizes import Sizes
from cogvx_fast.bench.workloads import WORKLOADS

from .conftest import row

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
FOUND = {
    "disk_bytes": 350_000_000,
    "loading_peak_bytes": 360_000_000,
    "running_peak_bytes": 510_000_000,
    "loading_predicted_bytes": 350_000_000,
    "running_predicted_bytes": 500_000_000,
    "running_peak_keeping_bytes": 600_000_000,
}
NO_TIMES = dict.fromkeys(("p20_seconds", "p50_seconds", "p80_seconds", "first_call_seconds", "peak_memory_bytes"), None)


def sized(contender="ours", **changes):
    fields = {"series": "sizes", "stage": "load-and-step", "n": 1, "error": 0.02, "budget": 0.1, "extras": FOUND}
    return row(contender, **{**fields, **NO_TIMES, **changes})


@pytest.mark.slow
@on_linux
def test_fresh_processes_take_what_is_predicted():
    model = {**WORKLOADS["dit-2b"].transformer, "num_attention_heads": 10, "num_layers": 1}
    small = dataclasses.replace(WORKLOADS["dit-2b"], transformer=model, steps=4)
    made, told = [], []
    rows = Sizes.run(Plan(small, "bfloat16", "cpu", "a command", ["ours-int8-weight"]), made.append, told.append)
    assert rows == made == [Row.from_json(rows[0].to_json())]
    (one,), extras = rows, rows[0].extras
    Sizes.check(one)
    assert (one.contender, one.engine["recipe"], one.n) == ("ours-int8-weight", "int8-weight", 1)
    assert told[1:] == ["ours-int8-weight"]
    # Libraries' own buffers do not shrink with the model.
    assert extras["loading_peak_bytes"] == pytest.approx(extras["loading_predicted_bytes"], abs=2**24)
    assert extras["running_peak_bytes"] == pytest.approx(extras["running_predicted_bytes"], abs=2**24)
    # On disk are the weights; in memory, too, the table of positions, which no file has.
    assert extras["disk_bytes"] < extras["loading_predicted_bytes"] < extras["disk_bytes"] * 1.4
    off = abs(extras["running_peak_bytes"] / extras["running_predicted_bytes"] - 1)
    assert one.error == pytest.approx(off) and one.gate == ("green" if off <= 0.1 else "red")
    assert f"{off:.1%} off its prediction, 10% allowed" in one.gate_detail


def test_a_row_states_bytes_and_no_times():
    Sizes.check(sized())
    Sizes.check(sized(gate="red", error=0.2))
    times = {"p20_seconds": 1.0, "p50_seconds": 1.0, "p80_seconds": 1.0}
    with pytest.raises(RowError, match="a row of sizes has n and extras, and no times"):
        Sizes.check(sized(**times))
    assert Sizes.line(sized(gate_detail="2.0% off")) == "510.0 MB while running, 2.0% off"


def test_the_report_has_a_table_and_no_picture(tmp_path):
    rows = [sized(), sized("ours-int8")]
    line = "| ours-int8 | 350.0 MB | 360.0 MB (350.0 MB) | 510.0 MB (500.0 MB) | +2.0% | 600.0 MB |"
    page = report(rows, "plots")
    assert line in page and ".png" not in page and write_plots(rows, tmp_path) == []
    assert latest(rows)[0].title == "dit-2b, bfloat16, sizes"


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [("vae", "cpu", "needs one with a transformer of real layer sizes"), ("dit-2b", "cuda", "it needs --device cpu")],
)
def test_what_cannot_be_measured_is_refused(name, device, message):
    with pytest.raises(ValueError, match=message):
        Sizes.check_workload(WORKLOADS[name], device)
