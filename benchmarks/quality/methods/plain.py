"""All steps computed, which the others are judged by; and simply fewer steps of the scheduler."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from .counting import whole_calls
from .method import DIFFUSERS, FAST, Job, Method, Prepared


def _find(pipe: Any, job: Job) -> dict[str, Any]:
    return {}


@contextlib.contextmanager
def _all_steps(pipe: Any, job: Job, parameters: dict[str, Any]) -> Iterator[Prepared]:
    yield Prepared(pipe, {"num_inference_steps": job.steps})


@contextlib.contextmanager
def _fewer_steps(pipe: Any, job: Job, parameters: dict[str, Any]) -> Iterator[Prepared]:
    yield Prepared(pipe, {"num_inference_steps": job.evaluations})


ALL = Method("all", "every step computed, engine='exact'", FAST, _find, _all_steps, whole_calls)
ALL_DIFFUSERS = Method(
    "all (diffusers)", "every step computed by diffusers' pipeline", DIFFUSERS, _find, _all_steps, whole_calls
)
FEWER_STEPS = Method("fewer steps", "K steps of the scheduler", FAST, _find, _fewer_steps, whole_calls)
