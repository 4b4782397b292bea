"""Schedules from published coefficients, for the family's own checkpoints. None of them was measured by us.

TeaCache (Liu et al. 2024, arXiv 2411.19108) found that how much the time embedding moves tells how much the network's
output does, by a polynomial that was fitted for each checkpoint; steps are computed where what has gathered since the
last computed one passes a threshold. In this family the embedding depends on the timestep alone, so that which steps
these are is known before the first one. The threshold is the one that gives the number of evaluations asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..family import Variant
from .schedule import COMPUTED, HISTORY, PREDICTED, ScheduleError, StepSchedule

NOT_MEASURED = "from published coefficients, not measured by us"
FIRST, LAST = 3, 1  # steps that are always computed
LEAST_SHARE = 0.8  # of the evaluations that are asked for

# Highest power first: TeaCache4CogVideoX1.5/teacache_sample_video.py and eval/teacache in ali-vilab/TeaCache 7c10efc.
COEFFICIENTS = {
    "2b": (-3.10658903e01, 2.54732368e01, -5.92380459e00, 1.75769064e00, -3.61568434e-03),
    "5b": (-1.53880483e03, 8.43202495e02, -1.34363087e02, 7.97131516e00, -5.23162339e-02),
    "1.5": (2.50210439e02, -1.65061612e02, 3.57804877e01, -7.81551492e-01, 3.58559703e-02),
    "1.5-i2v": (1.22842302e02, -1.04088754e02, 2.62981677e01, -3.06009921e-01, 3.71213220e-02),
}


def member(variant: Variant) -> str | None:
    """The published checkpoint that has this configuration, by its coefficients' name; None for another."""
    size, plain = (variant.num_attention_heads, variant.num_layers), variant.in_channels == variant.out_channels
    if size == (30, 30) and not variant.use_rotary_positional_embeddings:
        return "2b" if plain else None
    if size != (48, 42) or not variant.use_rotary_positional_embeddings:
        return None
    if variant.patch_size_t is None:  # 5b-I2V was given those of 5b by their authors
        return "5b" if plain or variant.use_learned_positional_embeddings else None
    return "1.5" if plain else "1.5-i2v" if variant.ofs_embed_dim is not None else None


class TimeEmbeddings:
    """The transformer's time embedding at every timestep, computed while its weights are at hand.

    Attributes:
        table: `(timesteps, time_embed_dim)`, fp32.
    """

    def __init__(self, transformer: Any, timesteps: int = 1000):
        weights = next(transformer.time_embedding.parameters())
        steps = torch.arange(timesteps, dtype=torch.int64, device=weights.device)
        with torch.no_grad():
            table = transformer.time_embedding(transformer.time_proj(steps).to(weights.dtype))
            if transformer.ofs_embedding is not None:  # which the pipelines give 2.0
                ofs = torch.full((1,), 2.0, dtype=torch.float32, device=weights.device)
                table = table + transformer.ofs_embedding(transformer.ofs_proj(ofs).to(weights.dtype))
        self.table = table.float().cpu()

    def changes(self, timesteps: Sequence[float]) -> list[float]:
        """How far each step's embedding is from the step's before, relative to that, by mean absolute values."""
        rows = self.table[[int(t) for t in timesteps]]
        apart = (rows[1:] - rows[:-1]).abs().mean(dim=1) / rows[:-1].abs().mean(dim=1)
        return [0.0, *apart.tolist()]


def schedule(name: str, embeddings: TimeEmbeddings, timesteps: Sequence[float], evaluations: int) -> StepSchedule:
    """The schedule with that many evaluations, or as few fewer as the rule can give.

    Args:
        name: of the coefficients.
        timesteps: of the generation, falling.

    Raises:
        ScheduleError: where the rule gives far fewer.
    """
    moved = [_polynomial(COEFFICIENTS[name], x) for x in embeddings.changes(timesteps)]
    low, high = 0.0, sum(map(abs, moved)) + 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _strip(moved, middle).count(COMPUTED) > evaluations:
            low = middle
        else:
            high = middle
    strip = _strip(moved, high)
    if strip.count(COMPUTED) < LEAST_SHARE * evaluations:
        raise ScheduleError(
            f"the published coefficients of {name} give {strip.count(COMPUTED)} evaluations where {evaluations} were"
            " wanted: the checkpoint's time embedding is another one; `cogvx-fast calibrate` finds its own schedule"
        )
    return StepSchedule(strip, tuple(timesteps), source=f"{NOT_MEASURED}: TeaCache's of {name}")


def _strip(moved: Sequence[float], threshold: float) -> str:
    strip, gathered = "", 0.0
    for step, change in enumerate(moved):
        gathered += change
        if step < max(FIRST, HISTORY) or step >= len(moved) - LAST or gathered >= threshold:
            strip, gathered = strip + COMPUTED, 0.0
        else:
            strip += PREDICTED
    return strip


def _polynomial(coefficients: Sequence[float], x: float) -> float:
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value
