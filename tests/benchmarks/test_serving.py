"""The load test on whole servers, ours and the one written by hand: a rehearsal, whose times say nothing."""

from pathlib import Path

import pytest

from cogvx_fast import demo_checkpoint
from cogvx_fast.bench.results import latest, series_of
from cogvx_fast.bench.serving import Serving
from cogvx_fast.bench.serving_run import ServingPlan, run
from cogvx_fast.machine import cpu_dtype

pytestmark = [pytest.mark.slow, pytest.mark.servers]

BASELINE = Path(__file__).parents[2] / "benchmarks" / "serving" / "baseline.py"
SMALL = {"width": 64, "height": 64, "num_frames": 9, "num_inference_steps": 2, "guidance_scale": 6.0, "fps": 8}


def test_both_servers_make_the_same_videos_and_are_asked_in_turns():
    plan = ServingPlan(
        demo_checkpoint(),
        cpu_dtype(),
        "cpu",
        "made up",
        SMALL,
        [1.0, 2.0],
        seconds=2.0,
        patience=60.0,
        baseline=BASELINE,
    )
    told, sunk = [], []
    rows = run(plan, sunk.append, told.append)
    assert rows == sunk and [(row.stage, row.contender) for row in rows] == [
        *(("1/s", "ours"), ("1/s", "baseline"), ("2/s", "ours"), ("2/s", "baseline"))
    ]
    for row in rows:
        assert series_of(row) is Serving and row.gate == "green", row.gate_detail
        assert row.extras["sent"] == row.n and row.extras["errors"] == 0, row.engine_report
        assert row.extras["psnr_to_the_other_db"] > 30
    ours, baseline = rows[:2]
    assert ours.engine == {"tier": "exact"} and "attention" in ours.engine_report[0] and baseline.engine is None
    assert baseline.extras["first_event_p50_seconds"] <= baseline.extras["done_p50_seconds"]
    (series,) = latest(rows)
    assert series.table([]).count("| ours |") == 2
