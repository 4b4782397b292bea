"""The network's output reused or extrapolated between steps that are computed at even distances."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .counting import whole_calls
from .method import FAST, Job, Method, Prepared, forward_replaced

FIRST, LAST = 5, 3  # steps that are always computed, where K has room for them


def even_steps(evaluations: int, steps: int) -> list[int]:
    """Which of `steps` are computed: the first five, the last three, the others at even distances between.

    Below nine evaluations first and last share what there is: half and, of the rest, half, rounded up.
    """
    first = min(FIRST, evaluations // 2)
    last = min(LAST, (evaluations - first + 1) // 2)
    gaps = evaluations - first - last + 1
    between = [first - 1 + round(j * (steps - last - first + 1) / gaps) for j in range(1, gaps)]
    return [*range(first), *between, *range(steps - last, steps)]


def extrapolated(kept: Sequence[tuple[int, torch.Tensor]], step: int) -> torch.Tensor:
    """The polynomial in the step index through `kept` (step, output), Lagrange's form, at `step`."""
    total = torch.zeros_like(kept[0][1])
    for index, output in kept:
        others = [other for other, _ in kept if other != index]
        weight = 1.0
        for other in others:
            weight *= (step - other) / (index - other)
        total += weight * output
    return total


def _find(pipe: Any, job: Job) -> dict[str, Any]:
    return {"computed": even_steps(job.evaluations, job.steps)}


def periodic(name: str, what: str, order: int) -> Method:
    """A method that predicts by the polynomial of this order through the last computed outputs, in float32."""

    @contextlib.contextmanager
    def apply(pipe: Any, job: Job, parameters: dict[str, Any]) -> Iterator[Prepared]:
        computed, kept = set(parameters["computed"]), []
        steps, inner = itertools.count(), pipe.transformer.forward

        def forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
            step = next(steps)
            if step not in computed:
                return (extrapolated(kept, step),)
            output = inner(*args, **kwargs)
            kept.append((step, output[0].float()))
            del kept[: -order - 1]
            return output

        with forward_replaced(pipe.transformer, forward):
            yield Prepared(pipe, {"num_inference_steps": job.steps})

    return Method(name, what, FAST, _find, apply, whole_calls)


PERIODIC = (
    periodic("periodic reuse", "the output of the last computed step", 0),
    periodic("periodic order 1", "the line through the last two computed outputs", 1),
    periodic("periodic order 2", "the parabola through the last three computed outputs", 2),
)
