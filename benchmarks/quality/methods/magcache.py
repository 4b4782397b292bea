"""MagCache's rule (Ma et al. 2025, github.com/Zehong-Ma/MagCache): by how the residual's length changes.

The ratios of lengths are measured on one prompt of this checkpoint. The first tenth of the steps is computed, which is
the least that its authors use; no limit on skips in a row but the threshold, as 10 evaluations of 50 need long ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .counting import whole_calls
from .method import FAST, Job, Method, Prepared
from .stack import nearest_threshold, residual_reused

RETENTION = 0.1  # of the steps: the first, all computed


def computed_steps(ratios: Sequence[float], threshold: float) -> list[int]:
    """The steps that are computed: an error |1 - product of ratios| is summed, and a step skipped while it is below."""
    computed, first = [], int(RETENTION * len(ratios) + 0.5)
    product, error = 1.0, 0.0
    for step, ratio in enumerate(ratios):
        if step >= first:
            product *= ratio
            error += abs(1 - product)
        if step < max(first, 1) or error > threshold:
            computed.append(step)
            product, error = 1.0, 0.0
    return computed


def ratios(pipe: Any, job: Job, base: str) -> list[float]:
    """Of each step: the mean over tokens of its residual's length over that of the step before; 1 at the first."""
    name = f"magnitude ratios, {base}"
    if name not in job.known:
        found: list[float] = []
        before: list[torch.Tensor] = []

        def watch(step: int, residual: torch.Tensor) -> None:
            length = residual.norm(dim=-1)
            found.append((length / before[0]).mean().item() if before else 1.0)
            before[:] = [length]

        with residual_reused(pipe.transformer, None, watch):
            job.sample(pipe, num_inference_steps=job.steps)
        job.known[name] = found
    return job.known[name]


def find(pipe: Any, job: Job, base: str) -> dict[str, Any]:
    """The threshold whose count is nearest to K, and its steps."""
    found = ratios(pipe, job, base)
    threshold = nearest_threshold(
        lambda limit: len(computed_steps(found, limit)), job.evaluations, highest=float(len(found)) ** 2
    )
    return {"threshold": threshold, "computed": computed_steps(found, threshold), "ratios": found}


@contextlib.contextmanager
def _apply(pipe: Any, job: Job, parameters: dict[str, Any]) -> Iterator[Prepared]:
    with residual_reused(pipe.transformer, set(parameters["computed"])):
        yield Prepared(pipe, {"num_inference_steps": job.steps})


MAGCACHE = Method(
    "MagCache",
    "the stack's residual, by measured ratios of its length",
    FAST,
    lambda pipe, job: find(pipe, job, FAST),
    _apply,
    whole_calls,
)
