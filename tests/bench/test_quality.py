"""PSNR, SSIM and signal-to-noise of known pictures, and the rows that state them."""

import math

import pytest
import torch

from cogvx_fast.bench.quality import psnr, relative_error_at, snr_db, ssim
from cogvx_fast.bench.rows import RowError

from .conftest import row

NO_TIMES = dict.fromkeys(("p20_seconds", "p50_seconds", "p80_seconds", "first_call_seconds", "peak_memory_bytes"), None)


def test_decibels():
    assert snr_db(0.1) == pytest.approx(20) and snr_db(0) == math.inf
    assert relative_error_at(snr_db(0.0123)) == pytest.approx(0.0123)
    frames = torch.rand(2, 3, 16, 16)
    assert psnr(frames, frames) == math.inf
    assert psnr(torch.full((1, 3, 16, 16), 0.6), torch.full((1, 3, 16, 16), 0.5)) == pytest.approx(20, abs=1e-4)


def test_ssim_of_equal_flat_and_unrelated_pictures():
    frames = torch.rand(2, 3, 24, 20, generator=torch.Generator().manual_seed(0))
    assert ssim(frames, frames) == pytest.approx(1)
    # Of two flat pictures only the means count.
    a, b = 0.6, 0.5
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    assert ssim(torch.full((1, 3, 12, 12), a), torch.full((1, 3, 12, 12), b)) == pytest.approx(expected, rel=1e-5)
    unrelated = torch.rand(2, 3, 24, 20, generator=torch.Generator().manual_seed(1))
    assert abs(ssim(frames, unrelated)) < 0.1
    assert ssim(frames, 1 - frames) < -0.5
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(frames[..., :10], frames[..., :10])


def test_rows_of_quality_state_distances_and_no_times():
    stated = row(series="quality", n=60, extras={"psnr_db": 40.0}, **NO_TIMES)
    assert stated.extras["psnr_db"] == 40.0
    for change in ({"extras": {}}, {"n": 0}, {"p50_seconds": 1.0}):
        with pytest.raises(RowError, match="a row of quality has n and extras, and no times"):
            row(**{"series": "quality", "n": 60, "extras": {"psnr_db": 40.0}, **NO_TIMES, **change})
    with pytest.raises(RowError, match="is not within budget"):
        row(series="quality", n=60, extras={"psnr_db": 9.0}, error=0.3, budget=0.03, **NO_TIMES)
