"""Compile many configurations for many targets, in processes of their own."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TypeVar

from .._triton.choice import describe
from ..targets import TARGETS
from . import Compiled, Launch, compile_for
from .models import Model

Result = TypeVar("Result")


class CompileError(Exception):
    """A configuration that does not compile; says which and why."""


@dataclass(frozen=True)
class Job:
    """One configuration of one launch of a model on one target, by their places in their lists.

    Launches hold kernels, which do not travel between processes: each process traces the model for itself, once.
    """

    model: Model
    launch: int
    target: str
    choice: int

    def compile(self) -> Compiled:
        """Raises `CompileError`."""
        launch = _launches(self.model)[self.launch]
        target = TARGETS[self.target]
        config = launch.configs(target)[self.choice]
        try:
            return compile_for(launch, target, config)
        except Exception as error:  # triton raises what its passes, ptxas and the kernel's own asserts raise
            raise CompileError(f"{launch.name} for {self.target}, {describe(config)}: {error}") from error


def fingerprint(job: Job) -> str:
    """The source of the kernel, what it is called with and the configuration, in a line."""
    launch = _launches(job.model)[job.launch]
    config = launch.configs(TARGETS[job.target])[job.choice]
    return f"{job.target} {launch.name} {launch.kernel.fn.cache_key} {launch.arguments} {config}"


@functools.lru_cache(maxsize=4)
def _launches(model: Model) -> list[Launch]:
    return model.launches


def kernel_names(model: Model) -> list[str]:
    """The kernels that a model launches, each once."""
    return list(dict.fromkeys(launch.name for launch in _launches(model)))


def jobs(model: Model, targets: Sequence[str], kernels: Sequence[str] | None = None, first: bool = False) -> list[Job]:
    """A job for each configuration, or for the one that is listed first; `kernels` leaves out all others.

    What several launches have in common is compiled once: the same kernel called with the same arguments.
    """
    found, seen = [], set()
    for index, launch in enumerate(_launches(model)):
        same = (launch.name, str(launch.arguments))
        if same in seen or (kernels is not None and launch.name not in kernels):
            continue
        seen.add(same)
        for target in targets:
            choices = launch.configs(TARGETS[target])
            found += [Job(model, index, target, choice) for choice in range(len(choices[:1] if first else choices))]
    return found


def run(jobs: Sequence[Job], work: Callable[[Compiled], Result], processes: int) -> Iterator[tuple[Job, Result]]:
    """Compile each job and give what `work`, a function of a module, makes of it, as they are done.

    Raises:
        CompileError: for the first that does not compile; those that were done before have been given.
    """
    if processes <= 1 or len(jobs) <= 1:
        for job in jobs:
            yield job, _do(job, work)
        return
    pool = ProcessPoolExecutor(min(processes, len(jobs)), multiprocessing.get_context("spawn"))
    try:
        waiting: dict[Future, Job] = {pool.submit(_do, job, work): job for job in jobs}
        for future in as_completed(waiting):
            yield waiting[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _do(job: Job, work: Callable[[Compiled], Result]) -> Result:
    return work(job.compile())
