"""How far an output is from the truth, and the correctness gate: no speed is stated for what is too far from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# The contract of the exact tier: how much larger than diffusers' own error, at that precision, an error may be.
BUDGET_FACTOR = 1.1
# That of a lossy recipe: the signal-to-noise ratio of one step's prediction, in decibels, that it must have at least.
FLOOR_DB = 30.0
# SSIM's window and constants, for values of a range of one (Wang, Bovik, Sheikh, Simoncelli 2004).
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True)
class Verdict:
    """`gate` is one of `rows.GATES`, `detail` the reason; the errors are means over the gate's inputs."""

    gate: str
    detail: str
    error: float | None = None
    own_error: float | None = None
    budget: float | None = None


NOT_FINITE = Verdict("red", "the output is not finite")


def judge(errors: Sequence[float], own_errors: Sequence[float], floor_db: float | None = None) -> Verdict:
    """The verdict on a contender, green or red.

    Args:
        errors: its relative errors against the reference, one for each of the gate's inputs.
        own_errors: those of diffusers, eager, at the same precision on the same inputs.
        floor_db: for one that may lose precision: the signal-to-noise ratio in decibels that the errors must keep,
            instead of a multiple of diffusers' own.
    """
    error, own = sum(errors) / len(errors), sum(own_errors) / len(own_errors)
    budget = BUDGET_FACTOR * own if floor_db is None else relative_error_at(floor_db)
    if not math.isfinite(error):
        return dataclasses.replace(NOT_FINITE, own_error=own, budget=budget)
    if error > budget:
        asked = (
            f"{BUDGET_FACTOR} x diffusers' own" if floor_db is None else f"a signal-to-noise ratio of {floor_db:g} dB"
        )
        return Verdict("red", f"error {error:.3g} is above the budget of {budget:.3g}, {asked}", error, own, budget)
    detail = f"mean over {len(errors)} inputs"
    if floor_db is not None:
        detail = f"{snr_db(error):.1f} dB signal-to-noise, {floor_db:g} allowed; {detail}"
    return Verdict("green", detail, error, own, budget)


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
    return float((output - expected).norm() / expected.norm())


def snr_db(relative_error: float) -> float:
    """The signal-to-noise ratio of a relative error in decibels."""
    return math.inf if relative_error == 0 else -20 * math.log10(relative_error)


def relative_error_at(snr: float) -> float:
    """The relative error that has this signal-to-noise ratio in decibels."""
    return float(10 ** (-snr / 20))


def psnr(frames: torch.Tensor, expected: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in decibels over all of two tensors of values in [0, 1]; infinite where they agree."""
    error = (frames.double() - expected.double()).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(frames: torch.Tensor, expected: torch.Tensor) -> float:
    """Structural similarity of the luma of `(frames, 3, height, width)` in [0, 1], the mean over frames and places.

    Raises:
        ValueError: for frames smaller than the window, 11 pixels.
    """
    if min(frames.shape[-2:]) < _WINDOW:
        raise ValueError(f"frames must be at least {_WINDOW} pixels high and wide, got {tuple(frames.shape)}")
    x, y = (
        (clip.double() * torch.tensor(_LUMA, dtype=torch.float64, device=clip.device).view(3, 1, 1)).sum(
            1, keepdim=True
        )
        for clip in (frames, expected)
    )
    place = torch.arange(_WINDOW, dtype=torch.float64, device=frames.device) - _WINDOW // 2
    line = torch.exp(-(place**2) / (2 * _SIGMA**2))
    window = (torch.outer(line, line) / line.sum() ** 2)[None, None]
    mean_x, mean_y = F.conv2d(x, window), F.conv2d(y, window)
    variance_x = F.conv2d(x * x, window) - mean_x**2
    variance_y = F.conv2d(y * y, window) - mean_y**2
    covariance = F.conv2d(x * y, window) - mean_x * mean_y
    similarity = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    similarity /= (mean_x**2 + mean_y**2 + _C1) * (variance_x + variance_y + _C2)
    return similarity.mean().item()
