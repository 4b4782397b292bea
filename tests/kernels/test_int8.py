"""The int8 products of a CPU against their formulas in fp64, at sizes that nobody tuned for."""

import pytest
import torch
import torch.nn.functional as F
from cogvx_kernels.cpu import int8

pytestmark = pytest.mark.skipif(int8.why_unavailable() is not None, reason=str(int8.why_unavailable()))
SIZES = ((1, 3, 5), (7, 12, 33), (13, 64, 130))


def tensors(rows, dim, out, dtype=torch.float32):
    x = torch.randn(rows, dim).to(dtype)
    weight = torch.randint(-128, 128, (out, dim), dtype=torch.int8)
    return x, weight, torch.rand(out) / 100, torch.randn(out)


@pytest.mark.parametrize("dtype", int8.DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_rows_are_rounded_to_the_nearest_of_255_steps(size, dtype):
    x = tensors(*size, dtype)[0]
    rows = int8.quantize_rows(x)
    scales = x.double().abs().amax(1) / 127
    assert torch.allclose(rows.scales.double(), scales, rtol=1e-6)
    error = (rows.values.double() * scales[:, None] - x.double()).abs()
    assert (error <= scales[:, None] * 0.5001).all()
    assert (rows.values.int().abs().amax(1) == 127).all()


@pytest.mark.parametrize("dtype", int8.DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_product_is_exact_but_for_its_last_rounding(size, dtype):
    x, weight, scales, bias = tensors(*size, dtype)
    rows = int8.quantize_rows(x)
    expected = rows.values.double() @ weight.double().t() * rows.scales[:, None].double() * scales.double()
    expected = expected + bias.double()
    wide = torch.full((len(x), 3 * len(weight)), torch.nan, dtype=dtype)
    output = wide[:, len(weight) : 2 * len(weight)]
    for buffer in (None, torch.empty(len(x) * len(weight) + 3, dtype=torch.int32), torch.empty(1, dtype=torch.int32)):
        output.fill_(torch.nan)
        int8.dequantize(int8.multiply(rows, weight, buffer), rows.scales, scales, bias, output)
        own = (expected.to(dtype).double() - expected).norm()  # of one rounding
        assert (output.double() - expected).norm() <= 1.1 * own + 1e-6 * expected.norm()
    assert wide[:, : len(weight)].isnan().all() and wide[:, 2 * len(weight) :].isnan().all()


@pytest.mark.parametrize("size", SIZES)
def test_rows_go_through_gelu_into_the_next_product(size):
    x, weight, scales, bias = tensors(*size)
    rows = int8.quantize_rows(x)
    sums = int8.multiply(rows, weight)
    wide = torch.empty(sums.shape)
    int8.dequantize(sums, rows.scales, scales, bias, wide)
    hidden = F.gelu(wide.double(), approximate="tanh")
    result = int8.gelu_quantize_rows(sums, rows.scales, scales, bias)
    expected = hidden.abs().amax(1) / 127
    assert torch.allclose(result.scales.double(), expected, rtol=1e-5)
    error = (result.values.double() * result.scales[:, None].double() - hidden).abs()
    assert (error <= expected[:, None] * 0.501).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(bad):
    x, weight, scales, bias = tensors(5, 16, 8)
    x[3, 2] = bad
    rows = int8.quantize_rows(x)
    output = torch.empty(5, 8)
    int8.dequantize(int8.multiply(rows, weight), rows.scales, scales, bias, output)
    assert output[3].isnan().all() and output[[0, 1, 2, 4]].isfinite().all()


def test_a_row_of_zeros_gives_the_bias():
    x, weight, scales, bias = tensors(2, 16, 8)
    rows = int8.quantize_rows(x.zero_())
    output = torch.empty(2, 8)
    int8.dequantize(int8.multiply(rows, weight), rows.scales, scales, bias, output)
    assert torch.equal(output, bias.expand(2, 8)) and not rows.scales.any()
