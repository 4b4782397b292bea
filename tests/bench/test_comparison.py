import math

import pytest

from cogvx_fast.bench.comparison import Group, break_even, groups, over_bound, over_previous, speedup

from .conftest import refused, row


def group(*rows):
    return Group(rows)


def test_factors_are_taken_within_a_stage():
    base, ours = row("diffusers", 2.0), row("ours", 0.5)
    text = row("diffusers", 9.0, stage="text")
    bound, packed = (row(name, p50, gate="none") for name, p50 in (("arithmetic", 0.5), ("arithmetic-packed", 0.4)))
    wrong = refused()
    all_of_them = group(text, base, ours, bound, packed, wrong)
    assert speedup(ours, all_of_them) == 4 and speedup(base, all_of_them) == 1
    assert over_bound(ours, all_of_them) == pytest.approx(1.25) and over_bound(text, all_of_them) is None
    assert speedup(wrong, all_of_them) is over_bound(wrong, all_of_them) is None
    assert speedup(bound, all_of_them) is over_bound(bound, all_of_them) is None
    assert over_previous(ours, all_of_them) == 4 and over_previous(base, all_of_them) is None
    assert speedup(ours, group(ours)) is None


@pytest.mark.parametrize(
    ("p50", "first", "calls"), [(0.5, 8.0, 15), (1.0, 8.0, math.inf), (0.5, 1.0, 1), (0.9, 1.05, 2)]
)
def test_break_even(p50, first, calls):
    base = row("diffusers", 1.0, first_call_seconds=1.0)
    compiled = row("compiled", p50, first_call_seconds=first)
    both = group(base, compiled)
    assert break_even(compiled, both) == calls and break_even(base, both) is None
    if math.isfinite(calls):

        def total(one, n):
            return one.first_call_seconds + (n - 1) * one.p50_seconds

        assert total(compiled, calls) <= total(base, calls)
        assert calls == 1 or total(compiled, calls - 1) > total(base, calls - 1)


def test_break_even_needs_both_times():
    assert break_even(refused(), group(row("diffusers"), refused())) is None
    assert break_even(row(), group(row())) is None


def test_the_latest_run_of_each_workload_and_dtype():
    old = row(run="a", time="2026-01-01T00:00:00+00:00")
    new = [row(name, run="b", time="2026-01-02T00:00:00+00:00") for name in ("diffusers", "ours")]
    other = row(run="c", dtype="float32")
    additions = row(run="d", series="ablation")
    found = groups([old, other, *new, additions])
    assert [g.title for g in found] == ["dit-2b, bfloat16", "dit-2b, bfloat16, ablation", "dit-2b, float32"]
    assert list(found[0].rows) == new
    assert found[1].slug == "dit-2b-bfloat16-ablation-some-cpu-r"
