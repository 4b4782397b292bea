"""Contenders beside busy processes: these run within a call and stand still between, and go with the bench."""

import sys
import time
from pathlib import Path

import pytest

from cogvx_fast.bench import busy
from cogvx_fast.bench.comparison import Comparison
from cogvx_fast.bench.workloads import WORKLOADS

from .test_runner import run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]


def spent():
    """Ticks of a core that the busy processes have had."""
    fields = [Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split() for process in busy._processes()]
    return sum(int(each[11]) for each in fields)


def test_they_run_within_the_block_alone():
    busy._processes()
    time.sleep(0.3)
    still = spent()
    time.sleep(0.3)
    assert spent() == still
    with busy.busy():
        time.sleep(0.3)
    assert spent() > still
    still = spent()
    time.sleep(0.3)
    assert spent() <= still + 1


def test_all_that_are_beside_something_make_a_row(toy_workload):
    import dataclasses

    workload = dataclasses.replace(toy_workload, stages=("denoise",), steps=2, gate_samples=1)
    names = WORKLOADS["demo-busy"].contenders
    choices = Comparison.choices()
    rows = run(workload, {name: choices[name] for name in names}, warmup=0)
    assert [row.contender for row in rows] == list(names) and {row.gate for row in rows} == {"green"}
    notes = {row.contender: row.measures for row in rows}
    assert "beside 2 processes" in notes["ours-busy"] and "beside" not in notes["ours"]
    assert notes["ours-busy-one-thread"].endswith("on 1 thread")


def test_others_are_not_run_beside_anything():
    for name, workload in WORKLOADS.items():
        if workload.contenders is not None and not name.endswith("-busy"):
            assert busy.BESIDE.keys().isdisjoint(workload.contenders)
        elif workload.contenders is None:
            assert all(set(workload.stages).isdisjoint(contender.stages) for contender in busy.BESIDE.values())
