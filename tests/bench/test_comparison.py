"""Factors, tables and pictures of contenders that took turns."""

import dataclasses
import math

import pytest

from cogvx_fast.bench.comparison import Comparison
from cogvx_fast.bench.rows import RowError
from cogvx_fast.bench.series import seconds

from .conftest import refused, row

ROWS = [
    row("diffusers", 1.0, engine=None, first_call_seconds=1.0),
    row("ours", 0.5, error=0.002, first_call_seconds=3.0),
    row("arithmetic", 0.4, gate="none", error=None, own_error=None, budget=None),
    refused("wrong"),
]


def test_factors_are_taken_within_a_stage():
    base, ours = row("diffusers", 2.0), row("ours", 0.5)
    text = row("diffusers", 9.0, stage="text")
    bound, packed = (row(name, p50, gate="none") for name, p50 in (("arithmetic", 0.5), ("arithmetic-packed", 0.4)))
    wrong = refused()
    series = Comparison([text, base, ours, bound, packed, wrong])
    assert series.speedup(ours) == 4 and series.speedup(base) == 1
    assert series.over_bound(ours) == pytest.approx(1.25) and series.over_bound(text) is None
    assert series.speedup(wrong) is series.over_bound(wrong) is None
    assert series.speedup(bound) is series.over_bound(bound) is None
    assert series.over_previous(ours) == 4 and series.over_previous(base) is None
    assert Comparison([ours]).speedup(ours) is None


@pytest.mark.parametrize(
    ("p50", "first", "calls"), [(0.5, 8.0, 15), (1.0, 8.0, math.inf), (0.5, 1.0, 1), (0.9, 1.05, 2)]
)
def test_break_even(p50, first, calls):
    base = row("diffusers", 1.0, first_call_seconds=1.0)
    compiled = row("compiled", p50, first_call_seconds=first)
    series = Comparison([base, compiled])
    assert series.break_even(compiled) == calls and series.break_even(base) is None
    if math.isfinite(calls):

        def total(one, n):
            return one.first_call_seconds + (n - 1) * one.p50_seconds

        assert total(compiled, calls) <= total(base, calls)
        assert calls == 1 or total(compiled, calls - 1) > total(base, calls - 1)


def test_break_even_needs_both_times():
    wrong, alone = refused(), row()
    assert Comparison([row("diffusers"), wrong]).break_even(wrong) is None
    assert Comparison([alone]).break_even(alone) is None


def test_table():
    assert Comparison(ROWS).table().splitlines() == [
        "| stage | contender | time | x diffusers | x arithmetic | first call | pays after | peak memory "
        "| error (x diffusers' own) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| dit-step | diffusers | 1.00 s (900 ms to 1.10 s) | 1.00x | 2.50x | 1.00 s |  | 123.0 MB | 0.004 (1.00x) |",
        "| dit-step | ours | 500 ms (450 ms to 550 ms) | 2.00x | 1.25x | 3.00 s | 5 calls | 123.0 MB | 0.002 (0.50x) |",
        "| dit-step | arithmetic | 400 ms (360 ms to 440 ms) |  |  | 800 ms |  | 123.0 MB |  |",
        "| dit-step | wrong | refused: error 2 is above the budget of 1 |  |  |  |  |  | 2 (500.00x) |",
    ]


def test_at_a_glance_there_is_a_line_for_what_both_ran():
    clip = [row("diffusers", 2.0, stage="vae-decode", own_error=None), refused("ours", stage="vae-decode")]
    table = Comparison.at_a_glance([Comparison(ROWS + clip)])
    what = "9x240x352 | Some CPU (R) | bfloat16"
    assert table.splitlines()[2:] == [
        f"| dit-step, dit-2b | {what} | 1.00 s | 500 ms | 2.00x | 123.0 MB | 123.0 MB | 0.50x |",
        f"| vae-decode, dit-2b | {what} | 2.00 s | refused |  | 123.0 MB |  | 500.00x |",
    ]
    assert Comparison.at_a_glance([Comparison([row("diffusers", 1.0)])]) == ""


def test_the_readme_has_of_several_machines_that_with_the_least_gain():
    quick = [row("diffusers", 1.0), row("ours", 0.25)]
    slow = [
        dataclasses.replace(one, provenance=dataclasses.replace(one.provenance, device_name="Another"))
        for one in (row("diffusers", 1.0), row("ours", 0.8))
    ]
    other = [row("diffusers", 1.0, stage="text"), row("ours", 0.9, stage="text")]
    table = Comparison.of_the_readme([Comparison(quick), Comparison(slow), Comparison(other)])
    (line,) = table.splitlines()[2:]
    assert line.startswith("| dit-step, dit-2b |") and "Another" in line and "1.25x" in line
    assert Comparison.of_the_readme([Comparison(other)]) == ""


def test_the_console_says_when_compiling_pays():
    assert Comparison(ROWS).remarks() == ["dit-step: ours makes up for its first call after 5 calls"]
    assert Comparison.line(ROWS[1]) == "500 ms (450 ms to 550 ms), first call 3.00 s"
    assert Comparison.line(ROWS[3]) == "REFUSED, error 2 is above the budget of 1"


@pytest.mark.parametrize("rows", [ROWS, [refused()]])
def test_plot(rows):
    pytest.importorskip("matplotlib")
    assert Comparison(rows).plot().startswith(b"\x89PNG")


def test_a_row_states_times_or_is_refused():
    for good in ROWS:
        Comparison.check(good)
    nothing = {"p20_seconds": None, "p50_seconds": None, "p80_seconds": None}
    with pytest.raises(RowError, match="must be positive and in order"):
        Comparison.check(row(**nothing))
    with pytest.raises(RowError, match="the gate is red, so no speed may be stated"):
        Comparison.check(refused(extras={"weights_bytes": 1}))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (83.456, "83.5 s"),
        (1.0, "1.00 s"),
        (0.5, "500 ms"),
        (0.00321, "3.21 ms"),
        (4.2e-6, "4.20 µs"),
        (1234.5, "1,234 s"),
    ],
)
def test_seconds(value, text):
    assert seconds(value) == text
