"""TeaCache's rule (Liu et al. 2024, arXiv 2411.19108), as its authors have it for CogVideoX.

A step is skipped while a polynomial of the time embedding's relative change, summed since the last computed step, is
below a threshold. Nothing in it depends on prompt or noise: for a checkpoint and a threshold the steps are always the
same, so they are found before the generation.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .counting import whole_calls
from .method import FAST, Job, Method, Prepared
from .stack import nearest_threshold, residual_reused, time_embedding

# Highest power first; published in github.com/ali-vilab/TeaCache, TeaCache4CogVideoX1.5 (commit 7c10efc).
POLYNOMIALS = {
    "2b": (-31.0658903, 25.4732368, -5.92380459, 1.75769064, -0.00361568434),
    "5b": (-1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339),
    "1.5-5b": (250.210439, -165.061612, 35.7804877, -0.781551492, 0.0358559703),
}


def kind(config: Any) -> str:
    """Whose polynomial a transformer takes: 1.5 has patches of frames, 5b rotary positions, and 2b neither."""
    if config.patch_size_t is not None:
        return "1.5-5b"
    return "5b" if config.use_rotary_positional_embeddings else "2b"


def computed_steps(changes: Sequence[float], threshold: float) -> list[int]:
    """The steps that are computed, the first and the last always; `changes[i]`: the polynomial's value at step i."""
    computed, total = [], 0.0
    for step, change in enumerate(changes):
        total += change
        if step in (0, len(changes) - 1) or total >= threshold:
            computed.append(step)
            total = 0.0
    return computed


@torch.no_grad()
def changes(pipe: Any, steps: int) -> list[float]:
    """The polynomial of the time embedding's relative change at each step; 0 at the first."""
    transformer = pipe.transformer
    pipe.scheduler.set_timesteps(steps, device=transformer.device)
    embeddings = [time_embedding(transformer, t[None]).float() for t in pipe.scheduler.timesteps]
    found = [0.0]
    for before, after in itertools.pairwise(embeddings):
        x = ((after - before).abs().mean() / before.abs().mean()).item()
        value = 0.0
        for coefficient in POLYNOMIALS[kind(transformer.config)]:
            value = value * x + coefficient
        found.append(value)
    return found


def _find(pipe: Any, job: Job) -> dict[str, Any]:
    values = changes(pipe, job.steps)
    threshold = nearest_threshold(
        lambda limit: len(computed_steps(values, limit)), job.evaluations, sum(map(abs, values))
    )
    return {"threshold": threshold, "computed": computed_steps(values, threshold)}


@contextlib.contextmanager
def _apply(pipe: Any, job: Job, parameters: dict[str, Any]) -> Iterator[Prepared]:
    with residual_reused(pipe.transformer, set(parameters["computed"])):
        yield Prepared(pipe, {"num_inference_steps": job.steps})


TEACACHE = Method("TeaCache", "the stack's residual, by the time embedding's change", FAST, _find, _apply, whole_calls)
