"""Our own convolution on a CPU against torch's in fp64: as exact, whatever the size, and in its place only."""

import pytest
import torch
import torch.nn.functional as F
from cogvx_kernels.conv3d import direct as convolution

pytestmark = pytest.mark.skipif(convolution.why_unavailable() is not None, reason=str(convolution.why_unavailable()))

# inputs, outputs, kernel, size of the result: blocks of channels whole and not, rows shorter and longer than a segment.
CASES = [
    (1, 1, (1, 1, 1), (1, 1, 1)),
    (16, 3, (3, 3, 3), (2, 3, 5)),
    (24, 40, (3, 3, 3), (1, 4, 7)),
    (70, 64, (1, 2, 2), (3, 2, 13)),
    (128, 130, (3, 3, 3), (1, 2, 9)),
    (5, 80, (1, 3, 3), (1, 2, 200)),
]


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def operands(inputs, outputs, kernel, size, batch=2):
    x = randn(batch, *(n + k - 1 for n, k in zip(size, kernel, strict=True)), inputs, seed=0) + 0.5
    weight, bias = randn(outputs, inputs, *kernel, seed=1), randn(outputs, seed=2)
    expected = F.conv3d(x.permute(0, 4, 1, 2, 3).double(), weight.double(), bias.double()).permute(0, 2, 3, 4, 1)
    return x, weight, bias, expected


@pytest.mark.parametrize(("inputs", "outputs", "kernel", "size"), CASES)
def test_no_further_from_fp64_than_torch(inputs, outputs, kernel, size):
    x, weight, bias, expected = operands(inputs, outputs, kernel, size)
    theirs = F.conv3d(x.permute(0, 4, 1, 2, 3).contiguous(), weight, bias).permute(0, 2, 3, 4, 1)
    out = torch.full(expected.shape, float("nan"))
    convolution.convolution(x, convolution.pack(weight), bias, kernel, out)
    error, own = ((result.double() - expected).norm() / expected.norm() for result in (out, theirs))
    assert error <= 1.1 * own + 3e-8


@pytest.mark.parametrize("adds", [False, True])
def test_strided_frames_and_nothing_beside_them(adds):
    kernel, size = (1, 2, 2), (2, 3, 5)
    x, weight, bias, expected = operands(20, 24, kernel, size)
    around = randn(2, 4, 9, 14, 24, seed=3)
    before = around.clone()
    place = (slice(None), slice(1, 3), slice(1, 7, 2), slice(3, 13, 2))
    wide = torch.full((2, 3, 6, 8, 20), float("nan"))
    wide[:, :2, 1:5, 1:7] = x
    convolution.convolution(wide[:, :2, 1:5, 1:7], convolution.pack(weight), bias, kernel, around[place], adds)
    torch.testing.assert_close(around[place], (expected + (before[place] if adds else 0)).float(), rtol=1e-4, atol=1e-4)
    around[place] = before[place]
    assert torch.equal(around, before)


@pytest.mark.parametrize(("inputs", "outputs", "size"), [(16, 24, (4, 6)), (70, 130, (5, 7)), (3, 8, (2, 240))])
def test_a_stride_no_further_from_fp64_than_torch(inputs, outputs, size):
    x, weight, bias = (
        randn(2, 3, *size, inputs, seed=0) + 0.5,
        randn(outputs, inputs, 3, 3, seed=1),
        randn(outputs, seed=2),
    )
    x = F.pad(x, (0, 0, 0, 1, 0, 1))  # the size is odd then, or has a column more than is read
    frames = x.flatten(0, 1).permute(0, 3, 1, 2).contiguous()
    expected, theirs = (
        F.conv2d(frames.to(dtype), weight.to(dtype), bias.to(dtype), 2).permute(0, 2, 3, 1).unflatten(0, (2, 3))
        for dtype in (torch.float64, torch.float32)
    )
    out = torch.full(expected.shape, float("nan"))
    convolution.convolution(x, convolution.pack(weight), bias, (1, 3, 3), out, stride=2)
    error, own = ((result.double() - expected).norm() / expected.norm() for result in (out, theirs))
    assert error <= 1.1 * own + 3e-8


def test_without_a_bias():
    x, weight, _, expected = operands(8, 8, (3, 3, 3), (1, 2, 3))
    out = torch.empty(expected.shape)
    convolution.convolution(x, convolution.pack(weight), None, (3, 3, 3), out)
    expected = F.conv3d(x.permute(0, 4, 1, 2, 3), weight).permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_packing_is_told_its_size_first():
    for outputs, inputs, taps in ((3, 16, 27), (130, 5, 4)):
        packed = convolution.pack(torch.ones(outputs, inputs, 1, 1, taps))
        assert (
            packed.numel() == convolution.packed_size(outputs, inputs, taps) and packed.sum() == outputs * inputs * taps
        )


def test_a_result_that_does_not_fit_is_refused():
    x, packed = torch.zeros(1, 3, 4, 5, 8), convolution.pack(torch.zeros(8, 8, 3, 3, 3))
    with pytest.raises(ValueError, match=r"out must be \(1, 1, 2, 3\) and channels"):
        convolution.convolution(x, packed, None, (3, 3, 3), torch.zeros(1, 1, 2, 4, 8))
    with pytest.raises(ValueError, match="contiguous channels"):
        convolution.convolution(x, packed, None, (3, 3, 3), torch.zeros(1, 1, 2, 3, 16)[..., ::2])
