"""Contenders beside other processes that want the cores: a machine on which somebody else is at work, too."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import torch

from .. import threads
from .contenders import CONTENDERS, Builder, Contender, Prepared
from .reference import STAGES, Pipeline
from .workloads import Workload

PROCESSES = 2
_SPIN = "while True: pass"
_SETTLED = 0.02  # seconds until the system has given them cores


@functools.cache
def _processes() -> list[subprocess.Popen[bytes]]:
    """They are there until this process ends, and stand still but within `busy`."""
    found = [subprocess.Popen([sys.executable, "-c", _SPIN]) for _ in range(PROCESSES)]
    for process in found:
        process.send_signal(signal.SIGSTOP)
        atexit.register(process.kill)
    return found


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Within the block `PROCESSES` other processes want a core each."""
    processes = _processes()
    for process in processes:
        process.send_signal(signal.SIGCONT)
    time.sleep(_SETTLED)
    try:
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGSTOP)


def beside(build: Builder, is_busy: bool = True, most: int | None = None) -> Builder:
    """The contender that `build` makes, called beside `PROCESSES` busy processes and on at most so many threads.

    The time in which those settle counts, 0.02 s.
    """

    def prepare(pipe: Pipeline, workload: Workload, stage: str) -> Prepared:
        prepared = build(pipe, workload, stage)
        call = STAGES[stage].make(prepared.pipeline, workload, pipe.transformer.dtype)

        def called(number: int) -> torch.Tensor:
            with busy() if is_busy else contextlib.nullcontext(), threads.at_most(most):
                return call(number)

        notes = [f"beside {PROCESSES} processes that want a core each, {_SETTLED} s to settle included"] * is_busy
        notes += [] if most is None else [f"on {most} thread"]
        return dataclasses.replace(prepared, call=called, note="; ".join(filter(None, [prepared.note, *notes])))

    return prepare


def _contender(name: str, what: str, is_busy: bool, most: int | None = None) -> Contender:
    plain = CONTENDERS[name]
    built = beside(plain.build, is_busy, most)
    return dataclasses.replace(plain, build=built, what=what, stages=("denoise",), devices=("cpu",))


BESIDE: dict[str, Contender] = {
    "ours-one-thread": _contender("ours", "ours on one thread", is_busy=False, most=1),
    "diffusers-busy": _contender("diffusers", f"diffusers beside {PROCESSES} busy processes", is_busy=True),
    "ours-busy": _contender("ours", f"ours beside {PROCESSES} busy processes", is_busy=True),
    "ours-busy-one-thread": _contender("ours", "the same on one thread", is_busy=True, most=1),
}
