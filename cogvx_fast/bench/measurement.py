"""What a call takes: its time, what is said about several times, and its peak memory."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import devices
from ..machine import return_freed_memory

Call = Callable[[int], Any]  # the number of the call comes in, so that no two calls need be the same
Clock = Callable[[Callable[[], Any]], tuple[float, Any]]  # runs a call: its seconds and its result

_RSS = "growth of the process's peak resident memory (VmHWM) during one warm call"
_CUDA = "torch.cuda.max_memory_allocated during one warm call, all that is held included"


@dataclass(frozen=True)
class Summary:
    """20th, 50th and 80th percentile of `n` times, in seconds; between two times, linear (numpy's default)."""

    p20: float
    p50: float
    p80: float
    n: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Summary:
        """The summary of times that were measured, in any order."""
        p20, p50, p80 = np.quantile(seconds, (0.2, 0.5, 0.8)).tolist()
        return cls(p20, p50, p80, n=len(seconds))


def stopwatch(device: torch.device) -> Clock:
    """A function that runs a call and returns `(seconds, result)`.

    On CUDA the time is between two events on the device's stream, after a synchronisation: what the GPU was at work or
    waited for its next kernel. Elsewhere it is wall time.
    """
    return functools.partial(_cuda_seconds, device) if device.type == "cuda" else _wall_seconds


def _wall_seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def _cuda_seconds(device: torch.device, call: Callable[[], Any]) -> tuple[float, Any]:
    with devices.current(device):  # events, and the stream that they are recorded on, are the current device's
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        result = call()
        end.record()
        torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000, result


def alternate(
    calls: Mapping[str, Call],
    runs: int,
    clock: Clock,
    tell: Callable[[str, int], None] = lambda name, number: None,
    around: Callable[[str], AbstractContextManager[Any]] = lambda name: contextlib.nullcontext(),
) -> dict[str, list[float]]:
    """Seconds of `runs` calls of each, taken in turns (A B C A B C …), so that a slow minute slows all of them.

    Args:
        tell: is told the name and the number (from 0) of each call before it is made.
        around: what is entered around each call by its name, outside of what the clock sees.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(runs):
        for name, call in calls.items():
            tell(name, number)
            with around(name):
                seconds[name].append(clock(functools.partial(call, number))[0])
    return seconds


def peak_memory(call: Callable[[], Any], device: torch.device) -> tuple[int | None, str, Any]:
    """Bytes that one call of `call` needs at its peak, in words what exactly was measured, and the call's result.

    On a CPU the kernel counts: the peak of the resident memory is reset, the call is made, and what the process held
    before is subtracted. Weights and tables that exist already are therefore not in it. On CUDA, torch's allocator
    counts, and they are. Where neither is possible: None and the reason.

    Collect Python's garbage before: what it holds would count as held, or be freed by chance in between.
    """
    if device.type == "cuda":
        with devices.current(device):
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            result = call()
            torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device), _CUDA, result
    if device.type != "cpu":
        return None, f"not measured: no peak counter is known for {device.type}", call()
    # What freed tensors left in the heap would be taken for memory that is held.
    return_freed_memory()
    before = resident()
    try:
        reset_peak()
    except OSError as error:
        return None, f"not measured: /proc/self/clear_refs cannot be written ({error.strerror})", call()
    result = call()
    return max(0, peak_resident() - before), _RSS, result


def reset_peak() -> None:
    """Forget the most bytes of this process that were resident, see VmHWM in proc(5); an OSError where that fails."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_resident() -> int:
    """The most bytes of this process that were resident since the peak was reset."""
    return _status("VmHWM")


def resident() -> int:
    """The bytes of this process that are resident now."""
    return _status("VmRSS")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
