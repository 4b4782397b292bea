"""Recipes' videos beside the times of their steps: which rows belong together, and what is said without times."""

import dataclasses

import pytest

from cogvx_fast.bench.comparison import groups
from cogvx_fast.bench.report import readme_section, report
from cogvx_fast.bench.tradeoff import front, points, table

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


def group_of(rows):
    found = groups(rows)
    return next(group for group in found if group.is_quality), found


def test_gains_are_over_exact_of_the_same_dtype():
    rows = [timed("ours", 3.0), timed("ours-int8", 2.0), timed("ours-fp8", 1.0, dtype="float16", run="u")]
    rows += [quality("int8", 41.0), quality("fp8", 45.0)]
    found = points(*group_of(rows))
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
    lines = table(*group_of(rows)).splitlines()
    assert lines[0].startswith("| contender | dit-2b step | x exact | weights and step | SNR of the step | PSNR")
    assert lines[2] == "| diffusers | 3.50 s | 0.86x |  | 48.0 dB |  |  |  |  |"
    assert lines[3] == "| exact | 3.00 s | 1.00x | 400.0 MB | 48.0 dB |  |  |  | 98%, 98%, 98%, 98% |"
    assert lines[4].startswith(
        "| int8 | 2.00 s | 1.50x | 400.0 MB | 40.0 dB | 41.0 dB (39.0) | 0.9900 | 0.001, 0.05 | 98%"
    )
    assert lines[5] == "| diffusers-int8 | 6.00 s | 0.50x |  | 40.0 dB |  |  |  |  |"
    on_gpu = dataclasses.replace(PROVENANCE, cuda={"name": "a GPU"})
    (point,) = [
        p
        for p in points(
            *group_of([timed("ours", 3.0, provenance=on_gpu, **weights), quality("int8", 41.0, provenance=on_gpu)])
        )
        if p.timed
    ]
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
        assert "| int8 | " in report(part) and "| exact | " in report(part)
        assert "41.0 dB" in readme_section(part, "plots", "page.md")
    assert "refused: PSNR 20 dB" in report([quality("int8", 20.0, gate="red", gate_detail="PSNR 20 dB")])


def test_the_plot_is_a_picture():
    pytest.importorskip("matplotlib")
    from cogvx_fast.bench.plots import plot_tradeoff

    rows = [timed("ours", 3.0), timed("ours-int8", 2.0), timed("diffusers-int8", 4.0)]
    for part in (rows, []):
        assert plot_tradeoff(*group_of([*part, quality("int8", 41.0), quality("fp8", 45.0)])).startswith(b"\x89PNG")
