"""The operations on channels-last frames: the formulas against torch's own layers, C++ against the formulas in fp64."""

import pytest
import torch
import torch.nn.functional as F
from cogvx_kernels import ops
from cogvx_kernels._triton import why_unavailable
from cogvx_kernels.group_norm import cpu as frames

needs_compiler = pytest.mark.skipif(frames.why_unavailable() is not None, reason=str(frames.why_unavailable()))
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
    for impl in ("torch", "cpu") if frames.why_unavailable() is None else ("torch",):
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


@pytest.mark.parametrize(("kernel", "size"), [(3, 3), (1, 1), (1, 3), (2, 1)])
def test_causal_convolution_is_torchs_of_padded_frames(kernel, size):
    x, past = (randn(2, time, 4, 5, 6, seed=seed).double() for seed, time in enumerate((3, kernel - 1)))
    weight, bias = randn(7, 6, kernel, size, size, seed=2).double(), randn(7, seed=3).double()
    residual = randn(2, 3, 4, 5, 7, seed=4).double()
    for front, given in ((past, past), (x[:, :1].repeat(1, kernel - 1, 1, 1, 1), None)):
        frames = torch.cat([front, x], dim=1).permute(0, 4, 1, 2, 3)
        expected = F.conv3d(frames, weight, bias, padding=(0, size // 2, size // 2)).permute(0, 2, 3, 4, 1)
        torch.testing.assert_close(ops.causal_conv3d(x, weight, bias, given), expected)
        output = torch.full_like(expected[:, :, 1:3], float("nan"))
        ops.causal_conv3d(x, weight, bias, given, residual[:, :, 1:3], output, (1, 3))
        torch.testing.assert_close(output, (expected + residual)[:, :, 1:3])


@pytest.mark.parametrize("time", [1, 2, 3, 4])
@pytest.mark.parametrize("doubles", [True, False])
def test_phases_are_the_convolution_of_the_doubled_frames(time, doubles):
    x = randn(2, time, 3, 5, 6, seed=0).double()
    weight, bias = randn(7, 6, 3, 3, seed=1).double(), randn(7, seed=2).double()
    large = F.interpolate(x.flatten(0, 1).permute(0, 3, 1, 2), scale_factor=2, mode="nearest")
    expected = F.conv2d(large, weight, bias, padding=1).permute(0, 2, 3, 1).unflatten(0, (2, time))
    if doubles and time % 2:
        expected = torch.cat([expected[:, :1], expected[:, 1:].repeat_interleave(2, dim=1)], dim=1)
    elif doubles:
        expected = expected.repeat_interleave(2, dim=1)
    torch.testing.assert_close(ops.upsample_conv2d(x, weight, bias, doubles), expected)


def test_convolutions_refuse_what_does_not_fit():
    x, weight = torch.zeros(1, 2, 3, 4, 6), torch.zeros(5, 6, 3, 3, 3)
    with pytest.raises(ValueError, match=r"weight must be \(out channels, 6, kernel, size, size\) with an odd size"):
        ops.causal_conv3d(x, weight[..., :2, :2])
    with pytest.raises(ValueError, match=r"past must be \(1, 2, 3, 4, 6\), got \(1, 1, 3, 4, 6\)"):
        ops.causal_conv3d(x, weight, past=x[:, :1])
    with pytest.raises(ValueError, match=r"rows=\(1, 4\) must be first and after the last of the 3 rows"):
        ops.causal_conv3d(x, weight, rows=(1, 4))
    with pytest.raises(ValueError, match=r"residual must be \(1, 2, 3, 4, 5\) torch.float32"):
        ops.causal_conv3d(x, weight, residual=x)
    with pytest.raises(ValueError, match=r"bias must be \(5,\)"):
        ops.causal_conv3d(x, weight, torch.zeros(6))
    with pytest.raises(ValueError, match=r"weight must be \(out channels, 6, 3, 3\)"):
        ops.upsample_conv2d(x, weight)
    if why_unavailable() is None:
        with pytest.raises(ValueError, match='upsample_conv2d: impl="triton" takes tensors on a GPU, got cpu'):
            ops.upsample_conv2d(x, weight[:, :, 0], impl="triton")
