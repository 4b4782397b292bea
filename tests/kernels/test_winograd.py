"""The convolution with fewer products against torch's in fp64, at every size of tile, and in its place only."""

import math

import pytest
import torch
import torch.nn.functional as F
from cogvx_kernels.conv3d import winograd

pytestmark = pytest.mark.skipif(winograd.why_unavailable() is not None, reason=str(winograd.why_unavailable()))

# inputs, outputs, taps, size of the result: tiles, vectors and blocks of channels whole and not, several segments.
CASES = [
    (1, 1, 1, (1, 1, 1)),
    (16, 3, 3, (2, 3, 5)),
    (24, 40, 3, (1, 4, 7)),
    (3, 128, 3, (2, 8, 9)),
    (70, 64, 1, (3, 2, 13)),
    (128, 130, 3, (1, 2, 9)),
    (5, 80, 1, (1, 7, 203)),
]
DTYPES = [torch.float32, torch.bfloat16]


def randn(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(inputs, outputs, taps, size, dtype, batch=2):
    time, height, width = size
    x = randn(batch, time + taps - 1, height + 2, width + 2, inputs, seed=0, dtype=dtype) + 0.5
    weight, bias = randn(outputs, inputs, taps, 3, 3, seed=1, dtype=dtype), randn(outputs, seed=2)
    weight = weight / math.sqrt(9 * taps * inputs)
    exact = F.conv3d(x.permute(0, 4, 1, 2, 3).double(), weight.double(), bias.double()).permute(0, 2, 3, 4, 1)
    return x, weight, bias, exact


def error(result, exact):
    return ((result.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs", "taps", "size"), CASES)
def test_no_further_from_fp64_than_torch(inputs, outputs, taps, size, dtype):
    x, weight, bias, exact = operands(inputs, outputs, taps, size, dtype)
    theirs = F.conv3d(x.permute(0, 4, 1, 2, 3).contiguous(), weight, bias.to(dtype)).permute(0, 2, 3, 4, 1)
    out = torch.full(exact.shape, float("nan"), dtype=dtype)
    winograd.convolution(x, winograd.pack(weight), bias, taps, out)
    # In fp32 few channels give torch nothing to round, and the transforms still do: twice, of sums of four terms.
    terms = F.conv3d(x.permute(0, 4, 1, 2, 3).double().abs(), weight.double().abs(), bias.double().abs())
    slack = (1e-7 if dtype == torch.float32 else 1e-5) * terms.norm() / exact.norm()
    assert error(out, exact) <= 1.05 * error(theirs, exact) + slack


def test_many_channels_in_fp32_round_no_more_than_torchs_do():
    x, weight, bias, exact = operands(512, 32, 3, (1, 6, 10), torch.float32)
    theirs = F.conv3d(x.permute(0, 4, 1, 2, 3).contiguous(), weight, bias).permute(0, 2, 3, 4, 1)
    out = torch.empty(exact.shape)
    winograd.convolution(x, winograd.pack(weight), bias, 3, out)
    assert error(out, exact) <= 1.1 * error(theirs, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adds", [False, True])
def test_strided_frames_and_nothing_beside_them(adds, dtype):
    x, weight, bias, exact = operands(20, 24, 3, (2, 3, 5), dtype)
    around = randn(2, 4, 9, 14, 40, seed=3, dtype=dtype)
    before = around.clone()
    place = (slice(None), slice(1, 3), slice(1, 7, 2), slice(3, 13, 2), slice(8, 32))
    wide = torch.full((2, 5, 7, 9, 20), float("nan"), dtype=dtype)
    wide[:, :4, 1:6, 1:8] = x
    winograd.convolution(wide[:, :4, 1:6, 1:8], winograd.pack(weight), bias, 3, around[place], adds)
    expected = exact + (before[place].double() if adds else 0)
    # The sum is rounded once.
    assert error(around[place], expected) <= 1.02 * error(expected.to(dtype), expected) + 1e-6
    around[place] = before[place]
    assert torch.equal(around, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_bias(dtype):
    x, weight, bias, exact = operands(8, 8, 3, (1, 2, 3), dtype)
    out = torch.empty(exact.shape, dtype=dtype)
    winograd.convolution(x, winograd.pack(weight), None, 3, out)
    assert error(out, exact - bias.double()) <= (5e-7 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_seen_and_stays_near(value, dtype):
    x, weight, bias, _ = operands(8, 8, 1, (1, 12, 12), dtype, batch=1)
    x[0, 0, 1, 1, 3] = value
    out = torch.empty(1, 1, 12, 12, 8, dtype=dtype)
    winograd.convolution(x, winograd.pack(weight), bias, 1, out)
    assert not out[0, 0, :2, :2].isfinite().any() and out[0, 0, 4:, 4:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_is_told_its_size_first(dtype):
    packed = winograd.pack(torch.ones(130, 5, 3, 3, 3, dtype=dtype))
    assert packed.numel() == winograd.packed_size(130, 5, 3, dtype)
    # Along an axis three ones are weighted with 1, 3/2, 1/2 and 1, or with 1/4, -1/2, -1/6, 7/24, 1/8 and 1.
    axis = 4 if dtype == torch.float32 else 1
    torch.testing.assert_close(packed.double().sum(), torch.tensor(130 * 5 * 3 * axis**2, dtype=torch.double))


def test_a_result_that_does_not_fit_is_refused():
    x, packed = torch.zeros(1, 3, 4, 5, 8), winograd.pack(torch.zeros(8, 8, 3, 3, 3))
    with pytest.raises(ValueError, match=r"out must be \(1, 1, 2, 3\) and channels"):
        winograd.convolution(x, packed, None, 3, torch.zeros(1, 1, 2, 4, 8))
    with pytest.raises(ValueError, match="contiguous as in x"):
        winograd.convolution(x, packed, None, 3, torch.zeros(1, 1, 2, 3, 16)[..., ::2])
    with pytest.raises(ValueError, match=r"of torch.float32"):
        winograd.convolution(x, packed, None, 3, torch.zeros(1, 1, 2, 3, 8, dtype=torch.bfloat16))


def test_narrow_or_few_frames_are_left_to_direct_convolutions():
    kernel, pixels = (3, 3, 3), winograd.LEAST_PIXELS[torch.bfloat16]
    assert winograd.pays(kernel, 128, 3, pixels, torch.bfloat16) and winograd.pays(kernel, 16, 16, 1, torch.float32)
    assert not winograd.pays(kernel, 128, 128, pixels - 1, torch.bfloat16)
    assert not winograd.pays(kernel, 16, 16, pixels, torch.bfloat16)
    assert not winograd.pays(kernel, 3, 16, pixels, torch.float32)
    assert not winograd.pays((3, 1, 1), 128, 128, pixels, torch.float32)
