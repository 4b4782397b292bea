"""What a method is: how it is brought to K evaluations, how a generation is made with it, and how work is counted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from cogvx_fast import EngineConfig

FAST, DIFFUSERS = "fast", "diffusers"  # the pipelines: FastCogVideoXPipeline with engine="exact", and diffusers' own


class Unreachable(Exception):  # noqa: N818
    """A method cannot be brought to the number of evaluations; the message says why."""


class Counter(Protocol):
    """What a generation took."""

    @property
    def evaluations(self) -> float:
        """In evaluations of the whole network for the whole batch, both halves of guidance."""


@dataclass(frozen=True)
class Job:
    """What is asked of a method.

    Attributes:
        evaluations: K, how many evaluations of the network a generation may take.
        steps: of a generation that skips none.
        sample: makes one generation of one prompt by the pipeline it is given, up to the latents; its arguments go
            to the call.
        trial: the same of the first batch of prompts.
        schedule: file of the schedules that the engine follows; None: those that there are for the checkpoint.
        known: what methods found out and share, by a name; kept in the work folder, so JSON.
    """

    evaluations: int
    steps: int
    sample: Callable[..., None]
    trial: Callable[..., None]
    schedule: str | None = None
    known: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """A pipeline that is ready for one generation, and the arguments that its call gets beside the prompts."""

    pipe: Any
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """One way to make a generation of `Job.steps` steps with `Job.evaluations` evaluations.

    Attributes:
        what: it does, in words.
        base: the pipeline that it runs on, and whose run of all steps it is judged by: `FAST` or `DIFFUSERS`.
        find: the method's parameters for a job, as JSON has them. May make generations to find them.
            Raises `Unreachable`.
        apply: sets the pipeline up for one generation with these parameters, and takes everything away again.
        engine: the engine's configuration for a job, on `FAST`.
        count: counts what a generation takes while it is open. It is opened first, below the method.
    """

    name: str
    what: str
    base: str
    find: Callable[[Any, Job], dict[str, Any]]
    apply: Callable[[Any, Job, dict[str, Any]], AbstractContextManager[Prepared]]
    count: Callable[[Any], AbstractContextManager[Counter]]
    engine: Callable[[Job], EngineConfig] = lambda job: EngineConfig()


@contextlib.contextmanager
def forward_replaced(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """`forward` in the place of the module's own, which is there again afterwards."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
