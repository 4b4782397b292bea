"""The best schedule with each number of evaluations, by dynamic programming over what full generations told.

Between two computed steps the outputs are predicted from the last two computed ones and the latents, with weights that
are least squares over the prompts. Errors of one such span point the same way and are added as vectors, through the
products of all outputs; those of different spans are taken for independent, so that their squares add up. Each step's
error counts by how much the sampler takes of it and by what the network leaves of it in the end, which was measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..schedule import COMPUTED, HISTORY, PREDICTED, StepSchedule

LONGEST = 12  # steps from one computed to the next
RIDGE = 1e-6  # of the mean square: outputs next to each other are nearly the same


def best_schedules(
    products: np.ndarray, sizes: np.ndarray, gains: np.ndarray, timesteps: Sequence[float]
) -> dict[int, StepSchedule]:
    """The schedules by number of evaluations, of all numbers that are possible.

    Args:
        products: of all guided predictions and latents, see `Recording.products`; a mean over prompts.
        sizes: of the steps, see `step_sizes`.
        gains: what share of an error at each step is left at the end.
    """
    steps = len(sizes)
    spans = _Spans(products, sizes * gains)
    # By the last two computed steps and the number of evaluations: the least squared error, and the step before both.
    reached: dict[tuple[int, int], dict[int, tuple[float, int]]] = {(0, 1): {HISTORY: (0.0, -1)}}
    ends: dict[int, tuple[float, tuple[int, int]]] = {}
    for newest in range(1, steps):
        for other in range(max(0, newest - LONGEST), newest):
            for following, cost in spans.costs(other, newest) if (other, newest) in reached else ():
                for evaluations, (error, _) in reached[other, newest].items():
                    total = error + cost
                    if following == steps:
                        if evaluations not in ends or total < ends[evaluations][0]:
                            ends[evaluations] = total, (other, newest)
                        continue
                    there = reached.setdefault((newest, following), {})
                    if evaluations + 1 not in there or total < there[evaluations + 1][0]:
                        there[evaluations + 1] = total, other
    return {
        evaluations: _schedule(_path(reached, state, evaluations), spans, steps, timesteps)
        for evaluations, (_, state) in sorted(ends.items())
    }


def _path(
    reached: dict[tuple[int, int], dict[int, tuple[float, int]]], state: tuple[int, int], evaluations: int
) -> list[int]:
    other, newest = state
    path = [newest, other]
    while (before := reached[other, newest][evaluations][1]) >= 0:
        other, newest, evaluations = before, other, evaluations - 1
        path.append(before)
    return path[::-1]


def _schedule(computed: list[int], spans: _Spans, steps: int, timesteps: Sequence[float]) -> StepSchedule:
    strip = "".join(COMPUTED if step in computed else PREDICTED for step in range(steps))
    weights = {}
    for step in range(steps):
        if strip[step] == PREDICTED:
            newest, other = [i for i in computed if i < step][: -HISTORY - 1 : -1]
            w1, w2, w3 = (round(float(w), 6) for w in spans.weights(other, newest, step))
            weights[step] = w1, w2, w3
    return StepSchedule(strip, tuple(timesteps), weights)


class _Spans:
    """Errors of the steps between two computed ones, by the last two before them."""

    def __init__(self, products: np.ndarray, factors: np.ndarray):
        self._products, self._factors, self._steps = products, factors, len(factors)

    def weights(self, other: int, newest: int, step: int) -> np.ndarray:
        """Of the outputs of `newest` and `other`, and of the latents at `step`, by least squares."""
        chosen = [newest, other, self._steps + step]
        square = self._products[np.ix_(chosen, chosen)]
        square = square + RIDGE * np.trace(square) / len(chosen) * np.eye(len(chosen))
        return np.linalg.solve(square, self._products[chosen, step])

    def costs(self, other: int, newest: int) -> list[tuple[int, float]]:
        """The squared error of what lies between `newest` and each step that may be computed next, or the end."""
        error, found = np.zeros(2 * self._steps), [(newest + 1, 0.0)]
        for step in range(newest + 1, min(self._steps, newest + LONGEST)):
            w1, w2, w3 = self.weights(other, newest, step)
            factor = self._factors[step]
            error[step] += factor
            error[newest] -= factor * w1
            error[other] -= factor * w2
            error[self._steps + step] -= factor * w3
            found.append((step + 1, float(error @ self._products @ error)))
        return found
