"""The operations on channels-last frames: the formulas against torch's own layers, C++ against the formulas in fp64."""

import pytest
import torch
import torch.nn.functional as F
from cogvx_kernels import ops
from cogvx_kernels.cpu import frames

needs_compiler = pytest.mark.skipif(frames.why_not() is not None, reason=str(frames.why_not()))
IMPLS = ["torch", pytest.param("cpu", marks=needs_compiler)]
# batch, time, height, width, channels, groups: blocks of channels whole and not, rows longer than a piece.
SHAPES = [(1, 1, 1, 1, 2, 1), (2, 3, 5, 7, 24, 2), (1, 2, 3, 130, 32, 32), (3, 1, 4, 2, 66, 3)]


def randn(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def padded(x):
    """Where `x` is to be written: a view into frames with two more in front and a row around, all NaN."""
    batch, time, height, width, channels = x.shape
    whole = torch.full((batch, time + 2, height + 2, width, channels), float("nan"), dtype=x.dtype)
    return whole, whole[:, 2:, 1:-1]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_are_those_of_the_values(shape, dtype, impl):
    *size, groups = shape
    # A mean far from zero: sums of plain squares would lose the variance.
    x = (randn(*size, seed=0) * 0.5 + 40).to(dtype)
    mean, inverse = ops.group_norm_statistics(x, groups, 1e-6, impl)
    values = x.double().unflatten(-1, (groups, -1)).permute(0, 4, 1, 2, 3, 5).flatten(2)
    variance, expected = torch.var_mean(values, dim=2, correction=0)
    torch.testing.assert_close(mean.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(inverse.double(), (variance + 1e-6).rsqrt(), rtol=2e-5, atol=0)


def test_statistics_of_a_row_slice_take_its_strides():
    x = randn(2, 3, 6, 5, 8, seed=1)
    for impl in ("torch", "cpu") if frames.why_not() is None else ("torch",):
        for ours, expected in zip(
            ops.group_norm_statistics(x[:, :, 1:4], 4, impl=impl),
            ops.group_norm_statistics(x[:, :, 1:4].clone(), 4, impl="torch"),
            strict=True,
        ):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_modulated_silu_into_padded_frames(shape, dtype, impl):
    batch, time, height, width, channels, _ = shape
    x = randn(batch, time, height, width, channels, seed=0, dtype=dtype)
    scale, shift = randn(2, batch, 2, 3, 2, channels, seed=1) * 3
    indices = [torch.arange(n) * m // n for n, m in zip((time, height, width), (2, 3, 2), strict=True)]
    f, r, c = torch.meshgrid(*indices, indexing="ij")
    expected = F.silu(x.double() * scale.double()[:, f, r, c] + shift.double()[:, f, r, c])
    whole, out = padded(x)
    ops.group_norm_modulate_silu(x, scale, shift, *indices, out, impl)
    # Rounded once: half an ulp of the dtype, and what fp32 loses.
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=1e-6)
    assert whole.isnan().sum() == whole.numel() - x.numel()  # nothing else was touched


@pytest.mark.parametrize("impl", IMPLS)
def test_silu_at_its_ends(impl):
    x = torch.tensor([0.0, -0.0, 1e-30, 88.0, -88.0, 200.0, -200.0, 3e38, torch.inf, torch.nan]).reshape(1, 1, 1, 1, -1)
    one, zero, index = torch.ones_like(x), torch.zeros_like(x), torch.zeros(1, dtype=torch.int64)
    out = torch.empty_like(x)
    ops.group_norm_modulate_silu(x, one, zero, index, index, index, out, impl)
    torch.testing.assert_close(out, F.silu(x), rtol=1e-6, atol=1e-30, equal_nan=True)


def test_what_does_not_fit_is_refused():
    x, index = torch.randn(1, 2, 3, 4, 6), torch.zeros(2, dtype=torch.int64)
    table = torch.randn(1, 1, 1, 1, 6)
    with pytest.raises(ValueError, match="groups=4 must divide the 6 channels"):
        ops.group_norm_statistics(x, 4)
    with pytest.raises(ValueError, match="x must be \\(batch, time, height, width, channels\\)"):
        ops.group_norm_statistics(x[0], 2)
    with pytest.raises(ValueError, match="out must be"):
        ops.group_norm_modulate_silu(x, table, table, index, index, index, x[:, :1])
    with pytest.raises(ValueError, match="rows must be int64 \\(3,\\)"):
        ops.group_norm_modulate_silu(x, table, table, index, index, index, torch.empty_like(x))
    with pytest.raises(ValueError, match="impl='fast' is unknown to group_norm_statistics"):
        ops.group_norm_statistics(x, 2, impl="fast")
    with pytest.raises(ValueError, match="whose rows are contiguous"):
        ops.group_norm_statistics(x.transpose(3, 4), 2, impl="cpu")
