"""How far a lossy result is from exact: signal-to-noise, PSNR and SSIM."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

# SSIM's window and constants, for values of a range of one (Wang, Bovik, Sheikh, Simoncelli 2004).
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def snr_db(relative_error: float) -> float:
    """The signal-to-noise ratio of a relative error in decibels."""
    return math.inf if relative_error == 0 else -20 * math.log10(relative_error)


def relative_error_at(snr: float) -> float:
    """The relative error that has this signal-to-noise ratio in decibels."""
    return 10 ** (-snr / 20)


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
        (clip.double() * torch.tensor(_LUMA, dtype=torch.float64).view(3, 1, 1)).sum(1, keepdim=True)
        for clip in (frames, expected)
    )
    place = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    line = torch.exp(-(place**2) / (2 * _SIGMA**2))
    window = (torch.outer(line, line) / line.sum() ** 2)[None, None]
    mean_x, mean_y = F.conv2d(x, window), F.conv2d(y, window)
    variance_x = F.conv2d(x * x, window) - mean_x**2
    variance_y = F.conv2d(y * y, window) - mean_y**2
    covariance = F.conv2d(x * y, window) - mean_x * mean_y
    similarity = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    similarity /= (mean_x**2 + mean_y**2 + _C1) * (variance_x + variance_y + _C2)
    return similarity.mean().item()
