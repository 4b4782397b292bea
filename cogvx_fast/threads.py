"""How many threads a generation on a CPU takes: no more than there are cores that nobody else is using.

Every operation ends with all threads waiting for the last. One that has no core keeps the others waiting for some
milliseconds each time: beside two busy processes on two cores, twenty steps of the demo take ten times as long on two
threads as on one.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch

_LOADAVG, _STAT = Path("/proc/loadavg"), Path("/proc/stat")
_GLANCES, _GLANCE = 8, 0.001  # how often the number of running threads is read, and seconds between
_LOOK = 0.04  # seconds in which the kernel's counters, which count in hundredths, are compared
_IDLE = (3, 4)  # columns of /proc/stat: idle, and waiting for a disk
_FRESH = 5.0  # seconds for which what was seen counts, as long as glances see as much
_MOSTLY = 0.75  # part of a core that counts as one
_FIXED: ContextVar[int | None] = ContextVar("cogvx_fast_threads", default=None)


@dataclass
class _Recent:
    """When was looked last, in seconds of the monotonic clock, and how many cores were free."""

    at: float = -math.inf
    free: float = 0.0


_recent = _Recent()


def choose(wanted: int) -> tuple[int, str]:
    """How many of `wanted` threads have a core of their own now, at least one, and why not all; "" for all.

    It takes 8 ms where cores are free, 50 where they may not be, and that once in some seconds. Where the kernel does
    not tell, it is all. Within `fixed`, it is that number.
    """
    if (fixed_number := _FIXED.get()) is not None:
        return fixed_number, ""
    if wanted < 2:
        return wanted, ""
    running = _running_elsewhere()
    cores = _cores()
    if running is None or not cores or running + wanted <= len(cores):
        return wanted, ""
    if time.monotonic() - _recent.at >= _FRESH:
        seen = _free(cores)
        if seen is None:
            return wanted, ""
        _recent.at, _recent.free = time.monotonic(), seen
    free = _recent.free
    threads = min(wanted, max(1, int(free + 1 - _MOSTLY)))
    return threads, "" if threads == wanted else f"other processes had {len(cores) - free:.1f} of {len(cores)} cores"


@contextlib.contextmanager
def fixed(threads: int) -> Iterator[None]:
    """Within the block generations take so many threads, whoever else is busy: matrix products are split among them, so
    that the last bits of a result are those of a number of threads."""
    token = _FIXED.set(threads)
    try:
        yield
    finally:
        _FIXED.reset(token)


@contextlib.contextmanager
def at_most(threads: int | None) -> Iterator[None]:
    """Within the block torch and our C++ take so many threads; None: as many as they are set to."""
    before = torch.get_num_threads()
    if threads is None or threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        if torch.get_num_threads() == threads:  # else somebody within has set another number
            torch.set_num_threads(before)


def _cores() -> list[int]:
    """Those that this process may run on; none where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _running_elsewhere() -> float | None:
    """Threads of other processes that run or wait for a core, the median of some glances; None where that is unknown.

    The kernel counts those of the whole machine: where this process has some of its cores, they may be elsewhere.
    """
    found = []
    for number in range(_GLANCES):
        if number:
            time.sleep(_GLANCE)
        try:
            found.append(int(_LOADAVG.read_text().split()[3].split("/")[0]) - 1)  # the reader itself runs
        except (OSError, ValueError, IndexError):
            return None
    return statistics.median(found)


def _free(cores: list[int]) -> float | None:
    """How many of these cores were idle, in cores, while this process slept."""
    before = _counters(cores)
    time.sleep(_LOOK)
    after = _counters(cores)
    if before is None or after is None:
        return None
    free = 0.0
    for core in cores:
        spent = [late - early for early, late in zip(before[core], after[core], strict=True)]
        free += sum(spent[column] for column in _IDLE) / max(1, sum(spent))
    return free


def _counters(cores: list[int]) -> dict[int, list[int]] | None:
    """The kernel's times of each core: user, nice, system, idle, waiting, interrupts, stolen."""
    try:
        lines = [line.split() for line in _STAT.read_text().splitlines() if line.startswith("cpu")]
        times = {line[0]: [int(value) for value in line[1:9]] for line in lines}
        return {core: times[f"cpu{core}"] for core in cores}
    except (OSError, ValueError, KeyError):
        return None
