"""Recipes' videos beside the times of their steps: which rows belong together, and what is said without times."""

import pytest

from cogvx_fast.bench.comparison import groups
from cogvx_fast.bench.report import readme_section, report
from cogvx_fast.bench.tradeoff import points, table

from .conftest import row

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


def test_gains_are_over_exact_of_the_same_dtype():
    rows = [timed("ours", 3.0), timed("ours-int8", 2.0), timed("ours-fp8", 1.0, dtype="float16", run="u")]
    rows += [quality("int8", 41.0), quality("fp8", 45.0)]
    found = groups(rows)
    group = next(group for group in found if group.is_quality)
    assert [(point.recipe, point.gain) for point in points(group, found)] == [("int8", 1.5), ("fp8", None)]
    text = table(group, found)
    assert "| int8 | 1.50x | 41.0 dB (39.0) | 0.9900 |" in text and "| fp8 |  | 45.0 dB" in text
    assert "shape 98% 98%" in text


def test_the_report_has_the_table_with_and_without_times():
    rows = [timed("ours", 3.0), timed("ours-int8", 2.0), quality("int8", 41.0)]
    for part in (rows, rows[2:]):
        assert "| int8 | " in report(part) and "41.0 dB" in readme_section(part, "plots")
    assert "refused: PSNR 20 dB" in report([quality("int8", 20.0, gate="red", gate_detail="PSNR 20 dB")])


def test_the_plot_is_a_picture():
    pytest.importorskip("matplotlib")
    from cogvx_fast.bench.plots import plot_tradeoff

    found = groups([timed("ours", 3.0), timed("ours-int8", 2.0), quality("int8", 41.0), quality("fp8", 45.0)])
    picture = plot_tradeoff(next(group for group in found if group.is_quality), found)
    assert picture.startswith(b"\x89PNG")
