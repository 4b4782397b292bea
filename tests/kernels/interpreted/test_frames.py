"""GroupNorm's statistics and the modulated norm as Triton kernels, interpreted, against the formulas in fp64."""

import pytest
import torch
from cogvx_kernels import ops
from cogvx_kernels.group_norm import triton as kernels
from cogvx_kernels.group_norm import triton_statistics as statistics

from tests.kernels.budget import assert_within_budget, randn

from .conftest import guarded

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# batch, time, height, width, channels, groups: one pixel, groups that are no power of two, spans and tiles with ends.
SHAPES = [(1, 1, 1, 1, 2, 1), (2, 3, 5, 7, 24, 2), (1, 2, 3, 37, 64, 32), (3, 1, 4, 2, 66, 3), (1, 1, 9, 15, 128, 32)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mean", "deviation"), [(0, 1), (40, 0.5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics(shape, mean, deviation, dtype, outputs):
    *size, groups = shape
    x = guarded(randn(*size, dtype=dtype, seed=0) * deviation + mean)
    got = ops.group_norm_statistics(x, groups, 1e-6, "triton")
    for value, truth in zip(got, ops.group_norm_statistics(x.double(), groups, 1e-6), strict=True):
        # A few ulps of fp32 of the values, which a small deviation makes many of its own.
        accuracy = 4 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(value.double(), truth, rtol=accuracy, atol=accuracy * (mean + deviation))
    assert len(outputs) == 4


def test_statistics_of_a_mean_of_many_deviations():
    """What sums of plain squares, and even of differences to one pixel that lies apart, would lose."""
    x = randn(1, 2, 16, 16, 8, dtype=torch.float32, seed=0) + 3000
    x[0, 0, 0, 0] = -5000
    got, truth = (ops.group_norm_statistics(t, 4, 1e-6, i) for t, i in ((guarded(x), "triton"), (x.double(), "torch")))
    for value, expected in zip(got, truth, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("config", range(len(statistics.SPAN_CONFIGS["rtx"])))
@pytest.mark.parametrize("most", [1, 4, 64])
def test_every_division_into_spans_gives_the_same(config, most, monkeypatch):
    x = guarded(randn(2, 2, 5, 7, 24, dtype=torch.float32, seed=0) + 2)
    kernel = statistics.group_norm_spans_kernel
    monkeypatch.setattr(kernel, "configs", {t: [configs[config]] for t, configs in kernel.configs.items()})
    monkeypatch.setattr(statistics, "SMALLEST_SPAN", 1)
    monkeypatch.setattr(statistics, "MOST_SPANS", most)
    got = ops.group_norm_statistics(x, 3, 1e-6, "triton")
    for value, truth in zip(got, ops.group_norm_statistics(x.double(), 3, 1e-6), strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [slice(None), slice(1, 4)])
def test_statistics_of_frames_with_gaps(rows):
    pairs = guarded(randn(2, 3, 6, 2, 5, 24, dtype=torch.float16, seed=0))
    for x in pairs[:, :, rows].unbind(3):
        got = ops.group_norm_statistics(x, 3, 1e-6, "triton")
        for value, truth in zip(got, ops.group_norm_statistics(x.double(), 3, 1e-6), strict=True):
            torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=1e-6)


def modulated(x, scale, shift, frames, rows, columns, impl):
    """The operation as a function: its result, written into frames with padding around them that must stay."""
    batch, time, height, width, channels = x.shape
    whole = x.new_full((batch, time + 2, height + 2, width + 1, channels), float("nan"))
    out = whole[:, 2:, 1:-1, :-1]
    ops.group_norm_modulate_silu(x, scale, shift, frames, rows, columns, out, impl)
    assert whole.isnan().sum() == whole.numel() - x.numel()
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_modulated_silu_into_padded_frames(shape, dtype):
    batch, time, height, width, channels, _ = shape
    x = guarded(randn(batch, time, height, width, channels, dtype=dtype, seed=0))
    scale, shift = (guarded(randn(batch, 2, 3, 2, channels, dtype=torch.float32, seed=seed)) * 3 for seed in (1, 2))
    # Indices stay integers where `wide` makes the values fp64.
    indices = [torch.arange(n) * m // n for n, m in zip((time, height, width), (2, 3, 2), strict=True)]

    def operation(x, scale, shift, impl):
        return modulated(x, scale, shift, *indices, impl)

    assert_within_budget(operation, (x, scale, shift), "triton")


def test_a_slice_of_rows_and_another_configuration(monkeypatch):
    kernel = kernels.group_norm_modulate_silu_kernel
    last = {target: configs[-1:] for target, configs in kernel.configs.items()}
    monkeypatch.setattr(kernel, "configs", last)
    whole = guarded(randn(2, 3, 9, 20, 128, dtype=torch.float16, seed=0))
    table = guarded(randn(2, 1, 1, 1, 128, dtype=torch.float32, seed=1))
    zeros = [torch.zeros(n, dtype=torch.int64) for n in (3, 4, 20)]
    arguments = (whole[:, :, 3:7], table, table)
    assert_within_budget(lambda *a, impl: modulated(*a, *zeros, impl), arguments, "triton")


def test_silu_at_its_ends():
    x = torch.tensor([0.0, -0.0, 1e-30, 88.0, -80.0, 200.0, -200.0, 3e38, torch.inf, torch.nan]).reshape(1, 1, 1, 1, -1)
    one, zero, index = torch.ones_like(x), torch.zeros_like(x), torch.zeros(1, dtype=torch.int64)
    out = torch.empty_like(x)
    ops.group_norm_modulate_silu(x, one, zero, index, index, index, out, "triton")
    torch.testing.assert_close(out, torch.nn.functional.silu(x), rtol=1e-5, atol=1e-30, equal_nan=True)


def test_refusals():
    x, index = torch.zeros(1, 1, 1, 2, 4), torch.zeros(1, dtype=torch.int64)
    table = torch.zeros(1, 1, 1, 1, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r'group_norm_modulate_silu: impl="triton" takes contiguous fp32 tables'):
        ops.group_norm_modulate_silu(x, table, table, index, index, index.repeat(2), torch.zeros_like(x), "triton")
    with pytest.raises(ValueError, match=r'group_norm_statistics: impl="triton" takes torch.float16'):
        ops.group_norm_statistics(x.double(), 2, impl="triton")
