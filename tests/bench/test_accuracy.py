"""Distances of known numbers and pictures, and the verdicts on them."""

import math

import pytest
import torch

from cogvx_fast.bench.accuracy import judge, psnr, reference_dtype, relative_error, relative_error_at, snr_db, ssim


def test_relative_error_of_known_numbers():
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
    assert relative_error(expected.bfloat16(), expected) == 0
    with pytest.raises(ValueError, match=r"shape \(1, 2\), the reference \(2,\)"):
        relative_error(expected[None], expected)


def test_the_budget_is_the_references_own_error():
    assert judge([0.011, 0.011], [0.010, 0.010]).gate == "green"
    verdict = judge([0.010, 0.014], [0.010, 0.010])
    assert verdict.gate == "red" and "error 0.012 is above the budget of 0.011" in verdict.detail
    assert (verdict.error, verdict.own_error) == (pytest.approx(0.012), pytest.approx(0.010))


@pytest.mark.parametrize("error", [float("nan"), float("inf")])
def test_what_is_not_finite_is_red(error):
    verdict = judge([error, 0.0], [0.01, 0.01])
    assert verdict.gate == "red" and verdict.error is None and "not finite" in verdict.detail


def test_float32_is_judged_by_float64():
    assert reference_dtype(torch.bfloat16) is reference_dtype(torch.float16) is torch.float32
    assert reference_dtype(torch.float32) is torch.float64


def test_a_lossy_recipe_is_held_to_a_signal_to_noise_ratio():
    verdict = judge([0.03, 0.03], [0.001, 0.001], floor_db=30)  # 30 dB are 0.0316
    assert verdict.gate == "green" and "30.5 dB signal-to-noise, 30 allowed" in verdict.detail
    verdict = judge([0.033, 0.033], [0.5, 0.5], floor_db=30)
    assert verdict.gate == "red" and "a signal-to-noise ratio of 30 dB" in verdict.detail
    assert judge([float("nan")], [0.01], floor_db=30).gate == "red"


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
