"""Times and memory of calls whose cost is known."""

import contextlib
from pathlib import Path

import pytest
import torch

from cogvx_fast.bench.measurement import Summary, alternate, peak_memory, stopwatch

CPU = torch.device("cpu")


def test_summary():
    assert Summary.of([5.0, 1.0, 4.0, 2.0, 3.0]) == Summary(p20=1.8, p50=3.0, p80=pytest.approx(4.2), n=5)
    assert Summary.of([4.0]) == Summary(4.0, 4.0, 4.0, n=1)


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
    seconds, result = stopwatch(CPU)(lambda: 42)
    assert seconds >= 0 and result == 42


class Calls:
    """Stands for `torch.cuda`, and writes down what is asked of which device."""

    def __init__(self, monkeypatch):
        self.made, self.current, self.elapsed = [], None, 250.0
        calls = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                calls.note("record", calls.current)

            def elapsed_time(self, end):
                return calls.elapsed

        @contextlib.contextmanager
        def current(device):
            before, self.current = self.current, device
            yield
            self.current = before

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device", current)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        for name in ("synchronize", "reset_peak_memory_stats", "max_memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, lambda device=None, name=name: self.note(name, device))

    def note(self, name, device):
        self.made.append((name, device))
        return 123


def test_events_and_waits_are_those_of_the_device(monkeypatch):
    calls, second = Calls(monkeypatch), torch.device("cuda", 1)
    assert stopwatch(second)(lambda: calls.current) == (0.25, second)
    names = ["synchronize", "record", "record", "synchronize"]
    assert calls.made == [(name, second) for name in names] and calls.current is None


def test_peak_memory_is_that_of_the_device(monkeypatch):
    calls, second = Calls(monkeypatch), torch.device("cuda", 1)
    peak, kind, result = peak_memory(lambda: calls.current, second)
    assert (peak, result) == (123, second) and "max_memory_allocated" in kind
    names = ["synchronize", "reset_peak_memory_stats", "synchronize", "max_memory_allocated"]
    assert calls.made == [(name, second) for name in names]


def test_sees_what_a_call_takes_and_gives_back():
    held = torch.ones(4_000_000)  # what is there before does not count
    small, kind, total = peak_memory(lambda: held.sum(), CPU)
    if small is None:
        pytest.skip(kind)
    large, kind, _ = peak_memory(lambda: torch.ones(20_000_000).sum(), CPU)
    assert "resident" in kind and total == 4_000_000
    assert small < 8_000_000 and 70_000_000 < large < 110_000_000


def test_says_why_it_could_not_measure(monkeypatch):
    def refuse(self, text, encoding):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    peak, kind, result = peak_memory(lambda: 42, CPU)
    assert (peak, result) == (None, 42) and "clear_refs cannot be written (Permission denied)" in kind
    assert peak_memory(lambda: None, torch.device("mps"))[1] == "not measured: no peak counter is known for mps"
