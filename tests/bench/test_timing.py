import numpy as np
import pytest
import torch

from cogvx_fast.bench.timing import Summary, alternate, percentile, stopwatch


def test_percentiles_of_known_numbers():
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.5) == 1.5
    assert percentile([4.0], 0.8) == 4.0
    assert percentile([0.0, 10.0, 20.0, 30.0, 40.0], 0.2) == pytest.approx(8.0)
    assert percentile([5.0, 1.0], 0) == 1.0 and percentile([5.0, 1.0], 1) == 5.0


def test_percentiles_are_numpys():
    values = torch.rand(37, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    for q in (0, 0.2, 0.5, 0.77, 0.8, 1):
        assert percentile(values, q) == pytest.approx(np.percentile(values, 100 * q), rel=1e-12)


@pytest.mark.parametrize(
    ("values", "q", "message"), [([], 0.5, "no values"), ([1.0], 1.5, "q=1.5 must be from 0 to 1")]
)
def test_percentile_errors(values, q, message):
    with pytest.raises(ValueError, match=message):
        percentile(values, q)


def test_summary():
    assert Summary.of([5.0, 1.0, 4.0, 2.0, 3.0]) == Summary(p20=1.8, p50=3.0, p80=4.2, n=5)


def test_contenders_alternate_and_each_call_has_its_number():
    order = []
    calls = {name: lambda number, name=name: order.append((name, number)) for name in "ABC"}
    ticks = iter(range(100))
    told = []
    seconds = alternate(
        calls, 2, lambda call: (float(next(ticks)), call()), lambda name, number: told.append((name, number))
    )
    assert order == [("A", 0), ("B", 0), ("C", 0), ("A", 1), ("B", 1), ("C", 1)] == told
    assert seconds == {"A": [0.0, 3.0], "B": [1.0, 4.0], "C": [2.0, 5.0]}


def test_stopwatch_returns_the_result():
    seconds, result = stopwatch(torch.device("cpu"))(lambda: 42)
    assert seconds >= 0 and result == 42
