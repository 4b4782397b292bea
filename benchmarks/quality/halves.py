"""`python -m benchmarks.quality.halves`: does it pay to compute only the conditional half of guidance at some steps?

Judged as schedules are: full generations of the demo checkpoint in float32 give the scalar products of both halves'
outputs and of the latents, and dynamic programming the least error for each cost, with and without steps at which only
the conditional half is computed, at half the cost. There the unconditional output is predicted from both halves' last
two outputs and the conditional one. What a half step computes is not used by others.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch

from cogvx_fast import FastCogVideoXPipeline, demo_checkpoint
from cogvx_fast.turbo.calibration import recording

from . import prompts

STEPS, CLIPS, LONGEST, MOST_HALVES, GUIDANCE = 50, 8, 12, 2, 6.0
RIDGE = 1e-6


def trajectories(dynamic: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Products of unconditional outputs, conditional ones and latents `(3 steps, 3 steps)`, step sizes, weights."""
    pipe: Any = FastCogVideoXPipeline.from_pretrained(demo_checkpoint(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    rows: list[tuple[torch.Tensor, ...]] = []

    def watch(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        unconditional, conditional = output[0].chunk(2)
        rows.append((unconditional, conditional, kwargs["hidden_states"].chunk(2)[0]))

    pipe.transformer.register_forward_hook(watch, with_kwargs=True)
    pipe(
        list(prompts.chosen(None, True).first(CLIPS).texts),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        use_dynamic_cfg=dynamic,
        generator=[torch.Generator().manual_seed(number) for number in range(CLIPS)],
        output_type="latent",
    )
    flat = torch.cat([torch.stack([row[part].flatten(1) for row in rows]) for part in range(3)]).double()
    products = torch.einsum("ipd,jpd->ij", flat, flat).numpy() / CLIPS
    timesteps = pipe.scheduler.timesteps.tolist()
    sizes = recording.step_sizes(pipe.scheduler.alphas_cumprod, [int(t) for t in timesteps])
    # diffusers' formula of dynamic guidance, with the number of steps where a number of timesteps would be.
    swings = [(1 - math.cos(math.pi * ((STEPS - t) / STEPS) ** 5.0)) / 2 for t in timesteps]
    weights = np.array([1 + GUIDANCE * swing if dynamic else GUIDANCE for swing in swings])
    return products, sizes, weights


class Spans:
    """Errors between two computed steps, by how many of the steps in between compute the conditional half."""

    def __init__(self, products: np.ndarray, sizes: np.ndarray, weights: np.ndarray):
        self.products, self.sizes, self.weights = products, sizes, weights

    def _left(self, target: np.ndarray, basis: list[int]) -> np.ndarray:
        """What least squares by `basis` leaves of `target`, as a vector over all rows."""
        square = self.products[np.ix_(basis, basis)]
        square = square + RIDGE * np.trace(square) / len(basis) * np.eye(len(basis))
        error = target.copy()
        error[basis] -= np.linalg.solve(square, self.products[basis] @ target)
        return error

    def costs(self, other: int, newest: int) -> list[tuple[int, list[float]]]:
        """By the step that is computed next: the squared errors with 0, 1, … half steps, each the best choice."""
        whole, half, found = [], [], [(newest + 1, [0.0])]
        for step in range(newest + 1, min(STEPS, newest + LONGEST)):
            factor, weight = self.sizes[step], self.weights[step]
            guided, unconditional = np.zeros(3 * STEPS), np.zeros(3 * STEPS)
            guided[step], guided[STEPS + step] = 1 - weight, weight
            unconditional[step] = 1.0
            outputs = [newest, other, STEPS + newest, STEPS + other]
            whole.append(factor * self._left(guided, [*outputs, 2 * STEPS + step]))
            half.append(factor * (1 - weight) * self._left(unconditional, [*outputs, STEPS + step, 2 * STEPS + step]))
            best = []
            for number in range(min(MOST_HALVES, len(whole)) + 1):
                errors = []
                for chosen in itertools.combinations(range(len(whole)), number):
                    total = sum(half[i] if i in chosen else whole[i] for i in range(len(whole)))
                    errors.append(float(total @ self.products @ total))
                best.append(min(errors))
            found.append((step + 1, best))
        return found


def least_errors(spans: Spans, with_halves: bool) -> dict[float, float]:
    """The least squared error by cost in evaluations."""
    reached: dict[tuple[int, int], dict[int, float]] = {(0, 1): {4: 0.0}}  # costs in halves
    ends: dict[int, float] = {}
    for newest in range(1, STEPS):
        for other in range(max(0, newest - LONGEST), newest):
            here = reached.get((other, newest))
            if here is None:
                continue
            for following, errors in spans.costs(other, newest):
                for halves, error in enumerate(errors if with_halves else errors[:1]):
                    for cost, before in here.items():
                        there = ends if following == STEPS else reached.setdefault((newest, following), {})
                        total = cost + halves + (0 if following == STEPS else 2)
                        there[total] = min(there.get(total, math.inf), before + error)
    return {cost / 2: error for cost, error in sorted(ends.items())}


def main() -> None:
    """Print the error with half steps as a share of that without, at equal cost."""
    print("| guidance | cost in evaluations | least error with half steps, of that without |")
    print("|---|---|---|")
    for dynamic in (False, True):
        spans = Spans(*trajectories(dynamic))
        without, with_halves = (least_errors(spans, halves) for halves in (False, True))
        for cost in (25, 21, 17, 14, 12, 10):
            share = math.sqrt(with_halves[cost] / without[cost])
            print(f"| {'dynamic' if dynamic else 'constant'} | {cost} | {share:.1%} |", flush=True)


if __name__ == "__main__":
    main()
