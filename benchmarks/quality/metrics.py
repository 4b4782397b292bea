"""How far a clip is from that of all steps, and what it shows. Of raw frames in [0, 1], not of a file."""

from __future__ import annotations

import importlib.util
import math

import torch

from cogvx_fast.bench.accuracy import psnr, ssim
from tools.demo_model.data import Scene
from tools.demo_model.reading import read

CEILING_DB = 100.0  # stated for clips that agree in every bit, or nearly so: rows hold no infinity


def distance(frames: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Of a clip `(frames, 3, height, width)` against another of the same prompt and noise.

    `temporal_psnr_db` is the PSNR of the differences of successive frames, a peak of one: what flickers or moves
    otherwise lowers it, what is merely of another tint does not. `motion` is the mean of their absolute values over
    that of the expected clip's. `flip` is there if `flip-evaluator` is: the mean over frames of FLIP's error at 67
    pixels a degree (Andersson et al. 2020), 0 for no difference that can be seen.
    """
    frames, expected = frames.float(), expected.float()
    moves, expected_moves = frames.diff(dim=0), expected.diff(dim=0)
    found = {
        "psnr_db": min(psnr(frames, expected), CEILING_DB),
        "ssim": ssim(frames, expected),
        "temporal_psnr_db": min(psnr(moves, expected_moves), CEILING_DB),
        "motion": _ratio(moves.abs().mean().item(), expected_moves.abs().mean().item()),
    }
    if importlib.util.find_spec("flip_evaluator") is not None:
        found["flip"] = _flip(frames, expected)
    return found


def shows(frames: torch.Tensor, scene: Scene) -> dict[str, bool]:
    """Whether a clip of the demo checkpoint shows its prompt's background, color, shape and motion."""
    return read(frames.float()).matches(scene)


def _ratio(value: float, expected: float) -> float:
    return value / max(expected, math.ulp(1.0))


def _flip(frames: torch.Tensor, expected: torch.Tensor) -> float:
    import flip_evaluator

    pairs = (
        [clip.permute(1, 2, 0).contiguous().cpu().numpy() for clip in pair]
        for pair in zip(expected, frames, strict=True)
    )
    errors = [flip_evaluator.evaluate(*pair, "LDR", applyMagma=False)[1] for pair in pairs]
    return sum(errors) / len(errors)
