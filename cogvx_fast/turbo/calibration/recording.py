"""What a full generation tells: how its outputs relate to each other, and what an error at one step comes to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..schedule import StepSchedule, line
from ..skipping import StepSkipping

SAMPLED = 2**20  # numbers of a clip that are compared: bounds the memory of the longest


class Recording(StepSkipping):
    """Computes every step, or as far as it is told gives outputs that it is handed, and keeps what goes by.

    Attributes:
        outputs: of the network at each step, as it gave them, on the CPU.
        guided: of each step the guided prediction, a sample of its numbers, fp32.
        latents: likewise what enters the step.
    """

    def __init__(self, schedule: StepSchedule, guidance: float, known: list[torch.Tensor] | None = None):
        super().__init__(schedule)
        self.guidance = guidance
        self.outputs: list[torch.Tensor] = []
        self.guided: list[torch.Tensor] = []
        self.latents: list[torch.Tensor] = []
        self._known = known or []

    def predicted(self, step: int | None, latents: torch.Tensor) -> torch.Tensor | None:
        assert step is not None
        if step < len(self._known):
            return self._known[step].to(latents.device)
        self._entering = latents
        return None

    def computed(self, step: int | None, output: torch.Tensor) -> None:
        self.outputs.append(output.cpu())
        prediction, latents = output.float(), self._entering.float()
        if self.guidance > 1:
            without, with_prompt = prediction.chunk(2)
            prediction, latents = without + self.guidance * (with_prompt - without), latents.chunk(2)[0]
        self.guided.append(_sample(prediction))
        self.latents.append(_sample(latents[:, :, : output.shape[2]]))

    def products(self) -> np.ndarray:
        """Scalar products of all guided predictions and, after these, latents: `(2 steps, 2 steps)`, fp64.

        Relative to the mean square of the predictions, so that every prompt counts alike.
        """
        rows = torch.stack([*self.guided, *self.latents]).double()
        products = (rows @ rows.T).numpy()
        return products / np.diagonal(products)[: len(self.guided)].mean()


def _sample(values: torch.Tensor) -> torch.Tensor:
    flat = values.reshape(-1)
    if flat.numel() > SAMPLED:  # with one seed, so that the same numbers of each step are taken
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randint(flat.numel(), (SAMPLED,), generator=generator, dtype=torch.int64, device="cpu")
        flat = flat[chosen.to(flat.device)]
    return flat.cpu()


@contextlib.contextmanager
def skipping_by(pipeline: Any, skipping: StepSkipping) -> Iterator[None]:
    """Within the block generations of `pipeline` skip steps as `skipping` does."""
    pipeline._make_skipping = lambda plan: skipping
    try:
        yield
    finally:
        del pipeline._make_skipping


def step_sizes(alphas_cumprod: torch.Tensor, timesteps: list[int]) -> np.ndarray:
    """How much an error of the prediction of v changes the latents after each step.

    DDIM's step (Song et al. 2021, eq. 12) for v-prediction (Salimans & Ho 2022) is linear in v; this is its factor,
    `sqrt(1 - b) sqrt(a) - sqrt(b) sqrt(1 - a)` with a and b the cumulated alphas before and after the step.
    """
    before = alphas_cumprod.cpu().double().numpy()[timesteps]
    after = np.append(before[1:], 1.0)
    return np.sqrt(1 - after) * np.sqrt(before) - np.sqrt(after) * np.sqrt(1 - before)


def error_of_line(products: np.ndarray, sizes: np.ndarray, start: int, length: int) -> float:
    """The size of the latents' error after `length` steps behind `start` were predicted by the line through the outputs
    of `start` and the step before it; in the unit of `products`."""
    error = np.zeros(len(products))
    for step in range(start + 1, start + 1 + length):
        newest, other = line(step, (start, start - 1))
        error[step] += sizes[step]
        error[start] -= sizes[step] * newest
        error[start - 1] -= sizes[step] * other
    return float(np.sqrt(max(error @ products @ error, 0.0)))


def disturbed(outputs: list[torch.Tensor], start: int, length: int) -> list[torch.Tensor]:
    """The outputs up to the end of such a span, with those in it on the line."""
    known = list(outputs[: start + 1])
    for step in range(start + 1, start + 1 + length):
        newest, other = line(step, (start, start - 1))
        value = outputs[start].float() * newest + outputs[start - 1].float() * other
        known.append(value.to(outputs[start].dtype))
    return known
