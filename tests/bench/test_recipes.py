"""The recipes: who stands beside whom, and their videos beside the times of their steps, or without times."""

import dataclasses

import pytest

from cogvx_fast.bench.accuracy import FLOOR_DB
from cogvx_fast.bench.recipes import Quality, Recipes, front
from cogvx_fast.bench.report import report
from cogvx_fast.bench.results import latest
from cogvx_fast.bench.rows import RowError
from cogvx_fast.quantization import RECIPES

from .conftest import PROVENANCE, row

FACTORS = ("background", "color", "shape", "motion")
NO_TIMES = dict.fromkeys(("p20_seconds", "p50_seconds", "p80_seconds", "first_call_seconds", "peak_memory_bytes"), None)


def quality(recipe, psnr, **changes):
    extras = {"psnr_db": psnr, "psnr_lowest_db": psnr - 2, "ssim": 0.99}
    extras |= {"latent_error_step_1": 0.001, "latent_error_step_50": 0.05}
    extras |= {f"{name}_accuracy{suffix}": 0.98 for name in FACTORS for suffix in ("", "_exact")}
    return row(
        **{
            "contender": recipe,
            "series": "quality",
            "workload": "demo",
            "run": "q",
            "shapes": {"batch": 10},
            "n": 60,
            "error": 0.01,
            "budget": 0.03,
            "extras": extras,
            **NO_TIMES,
            **changes,
        }
    )


def timed(contender, seconds, **changes):
    times = {"p20_seconds": seconds, "p50_seconds": seconds, "p80_seconds": seconds}
    return row(**{"contender": contender, "series": "recipes", "run": "t", "stage": "dit-step", **times, **changes})


def quality_of(rows):
    """The series of quality among `rows`, and all of them."""
    found = latest(rows)
    return next(series for series in found if isinstance(series, Quality)), found


def points(rows):
    series, found = quality_of(rows)
    return series.points(found)


def test_every_recipe_stands_beside_exact_and_diffusers():
    contenders = Recipes.choices()
    assert list(contenders)[:2] == ["diffusers", "ours"] and {f"ours-{name}" for name in RECIPES} <= set(contenders)
    lossy = {name for name, contender in contenders.items() if contender.floor_db is not None}
    assert lossy == set(contenders) - {"diffusers", "ours"}
    assert all(contenders[name].floor_db == FLOOR_DB for name in lossy)
    assert contenders["ours-fp8"].devices == ("cuda",) and contenders["ours-int8"].devices is None


def test_rows_of_quality_state_distances_and_no_times():
    Quality.check(quality("int8", 40.0))
    for change in ({"extras": {}}, {"n": 0}, {"p20_seconds": 1.0, "p50_seconds": 1.0, "p80_seconds": 1.0}):
        with pytest.raises(RowError, match="a row of quality has n and extras, and no times"):
            Quality.check(quality("int8", 40.0, **{"n": 60, **change}))


def test_gains_are_over_exact_of_the_same_dtype():
    rows = [timed("ours", 3.0), timed("ours-int8", 2.0), timed("ours-fp8", 1.0, dtype="float16", run="u")]
    rows += [quality("int8", 41.0), quality("fp8", 45.0)]
    found = points(rows)
    assert [(point.name, point.gain, point.psnr_db) for point in found] == [
        ("ours", 1.0, None),
        ("int8", 1.5, 41.0),
        ("fp8", None, 45.0),
    ]


def test_the_table_has_time_memory_distance_and_accuracy():
    weights = {"extras": {"weights_bytes": 300e6}, "peak_memory_bytes": 100_000_000}
    rows = [
        timed("diffusers", 3.5),
        timed("ours", 3.0, **weights),
        timed("ours-int8", 2.0, error=0.01, budget=0.03, **weights),
    ]
    rows += [timed("diffusers-int8", 6.0, error=0.01, budget=0.03), quality("int8", 41.0)]
    series, found = quality_of(rows)
    lines = series.table(found).splitlines()
    assert lines[0].startswith("| contender | dit-2b step | x exact | weights and step | SNR of the step | PSNR")
    assert lines[2] == "| diffusers | 3.50 s | 0.86x |  | 48.0 dB |  |  |  |  |"
    assert lines[3] == "| exact | 3.00 s | 1.00x | 400.0 MB | 48.0 dB |  |  |  | 98%, 98%, 98%, 98% |"
    assert lines[4].startswith(
        "| int8 | 2.00 s | 1.50x | 400.0 MB | 40.0 dB | 41.0 dB (39.0) | 0.9900 | 0.001, 0.05 | 98%"
    )
    assert lines[5] == "| diffusers-int8 | 6.00 s | 0.50x |  | 40.0 dB |  |  |  |  |"
    on_gpu = dataclasses.replace(PROVENANCE, cuda={"name": "a GPU"})
    on_a_gpu = [timed("ours", 3.0, provenance=on_gpu, **weights), quality("int8", 41.0, provenance=on_gpu)]
    (point,) = [point for point in points(on_a_gpu) if point.timed]
    assert point.memory == 100e6  # a GPU's counter has the weights in it


def test_the_front_is_what_nothing_beats():
    assert front([(1.0, 48), (0.6, 41), (0.9, 40), (0.7, 44), (2.0, 48), (0.6, 39)]) == [
        (0.6, 41),
        (0.7, 44),
        (1.0, 48),
    ]


def test_the_report_has_the_table_with_and_without_times():
    rows = [timed("ours", 3.0), timed("ours-int8", 2.0), quality("int8", 41.0)]
    for part in (rows, rows[2:]):
        assert "| int8 | " in report(part, "plots") and "| exact | " in report(part, "plots")
        assert "41.0 dB" in report(part, "plots")
    assert "refused: PSNR 20 dB" in report([quality("int8", 20.0, gate="red", gate_detail="PSNR 20 dB")], "plots")


def test_the_plot_is_a_picture():
    pytest.importorskip("matplotlib")
    rows = [timed("ours", 3.0), timed("ours-int8", 2.0), timed("diffusers-int8", 4.0)]
    for part in (rows, []):
        series, found = quality_of([*part, quality("int8", 41.0), quality("fp8", 45.0)])
        assert series.plot(found).startswith(b"\x89PNG")
