"""How long a call takes, and what is said about several such times."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[int], Any]  # the number of the call comes in, so that no two calls need be the same


def percentile(values: Sequence[float], q: float) -> float:
    """The `q`-quantile of `values`, `q` from 0 to 1.

    Sorted values lie at positions 0, 1, …, n - 1; the quantile is the value at position `q * (n - 1)`, linear
    between its two neighbours. That is definition 7 of Hyndman and Fan (1996), numpy's default.

    Raises:
        ValueError: without values, or for a `q` outside of 0 to 1.
    """
    if not values:
        raise ValueError("percentile of no values")
    if not 0 <= q <= 1:
        raise ValueError(f"q={q} must be from 0 to 1")
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


@dataclass(frozen=True)
class Summary:
    """20th, 50th and 80th percentile of `n` times, in seconds."""

    p20: float
    p50: float
    p80: float
    n: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Summary:
        return cls(*(percentile(seconds, q) for q in (0.2, 0.5, 0.8)), n=len(seconds))


def stopwatch(device: torch.device) -> Callable[[Callable[[], Any]], tuple[float, Any]]:
    """A function that runs a call and returns `(seconds, result)`.

    On CUDA the time is between two events on the stream, after a synchronisation: what the GPU was at work or waited
    for its next kernel. Elsewhere it is wall time.
    """
    return _cuda_seconds if device.type == "cuda" else _wall_seconds


def _wall_seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def _cuda_seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    result = call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000, result


def alternate(
    calls: Mapping[str, Call],
    runs: int,
    clock: Callable[[Callable[[], Any]], tuple[float, Any]],
    tell: Callable[[str, int], None] = lambda name, number: None,
) -> dict[str, list[float]]:
    """Seconds of `runs` calls of each, taken in turns (A B C A B C …), so that a slow minute slows all of them.

    Args:
        tell: is told the name and the number (from 0) of each call before it is made.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(runs):
        for name, call in calls.items():
            tell(name, number)
            elapsed, _ = clock(lambda call=call, number=number: call(number))
            seconds[name].append(elapsed)
    return seconds
