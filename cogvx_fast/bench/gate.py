"""The correctness gate: no speed is stated for an output that is further from the truth than what its tier allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .quality import relative_error_at, snr_db

# The contract of the exact tier: how much larger than diffusers' own error, at that precision, an error may be.
BUDGET_FACTOR = 1.1
# That of a lossy recipe: the signal-to-noise ratio of one step's prediction, in decibels, that it must have at least.
FLOOR_DB = 30.0


def reference_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision that counts as the truth for `dtype`: float32 for half precisions, float64 for float32.

    A run in float32 cannot be judged by float32: the error of the reference itself would be nothing.
    """
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else torch.float64


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    """`|output - expected| / |expected|`, Euclidean norms over all elements; NaN if `output` has one.

    Raises:
        ValueError: for tensors of different shapes.
    """
    if output.shape != expected.shape:
        raise ValueError(f"the output has shape {tuple(output.shape)}, the reference {tuple(expected.shape)}")
    output, expected = output.detach().cpu().double(), expected.detach().cpu().double()
    return ((output - expected).norm() / expected.norm()).item()


@dataclass(frozen=True)
class Verdict:
    """`gate` is "green", "red" or, for what computes no result, "none"; the errors are means over the gate's inputs."""

    gate: str
    detail: str
    error: float | None = None
    own_error: float | None = None
    budget: float | None = None


def judge(errors: Sequence[float], own_errors: Sequence[float], floor_db: float | None = None) -> Verdict:
    """The verdict on a contender.

    Args:
        errors: its relative errors against the reference, one for each of the gate's inputs.
        own_errors: those of diffusers, eager, at the same precision on the same inputs.
        floor_db: for one that may lose precision: the signal-to-noise ratio in decibels that the errors must keep,
            instead of a multiple of diffusers' own.
    """
    error, own = sum(errors) / len(errors), sum(own_errors) / len(own_errors)
    budget = BUDGET_FACTOR * own if floor_db is None else relative_error_at(floor_db)
    words = f"{BUDGET_FACTOR} x diffusers' own" if floor_db is None else f"a signal-to-noise ratio of {floor_db:g} dB"
    if not math.isfinite(error):
        return Verdict("red", "the output is not finite", own_error=own, budget=budget)
    if error > budget:
        return Verdict(
            "red",
            f"error {error:.3g} is above the budget of {budget:.3g}, {words}",
            error,
            own,
            budget,
        )
    if floor_db is not None:
        words = f"{snr_db(error):.1f} dB signal-to-noise, {floor_db:g} allowed; mean over {len(errors)} inputs"
        return Verdict("green", words, error, own, budget)
    return Verdict("green", f"mean over {len(errors)} inputs", error, own, budget)
