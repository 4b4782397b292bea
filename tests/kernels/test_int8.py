"""The int8 products of a CPU against their formulas in fp64, at sizes that nobody tuned for."""

import pytest
import torch
import torch.nn.functional as F
from cogvx_kernels import ops
from cogvx_kernels.w8a8_linear import cpu as int8

pytestmark = pytest.mark.skipif(int8.why_unavailable() is not None, reason=str(int8.why_unavailable()))
SIZES = ((1, 3, 5), (7, 12, 33), (13, 64, 130))


def tensors(rows, dim, out, dtype=torch.float32):
    x = torch.randn(rows, dim).to(dtype)
    weight = torch.randint(-128, 128, (out, dim), dtype=torch.int8)
    return x, weight, torch.rand(out) / 100, torch.randn(out)


@pytest.mark.parametrize("dtype", ops.CPU_DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_rows_are_rounded_to_the_nearest_of_255_steps(size, dtype):
    x = tensors(*size, dtype)[0]
    numbers, row_scales = int8.quantize_rows(x)
    scales = x.double().abs().amax(1) / 127
    assert torch.allclose(row_scales.double(), scales, rtol=1e-6)
    error = (numbers.double() * scales[:, None] - x.double()).abs()
    assert (error <= scales[:, None] * 0.5001).all()
    assert (numbers.int().abs().amax(1) == 127).all()


@pytest.mark.parametrize("dtype", ops.CPU_DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_product_is_exact_but_for_its_last_rounding(size, dtype):
    x, weight, scales, bias = tensors(*size, dtype)
    numbers, row_scales = int8.quantize_rows(x)
    expected = numbers.double() @ weight.double().t() * row_scales[:, None].double() * scales.double()
    expected = expected + bias.double()
    wide = torch.full((len(x), 3 * len(weight)), torch.nan, dtype=dtype)
    output = wide[:, len(weight) : 2 * len(weight)]
    for buffer in (None, torch.empty(len(x) * len(weight) + 3, dtype=torch.int32), torch.empty(1, dtype=torch.int32)):
        output.fill_(torch.nan)
        int8.dequantize(int8.int8_products(numbers, weight, buffer), row_scales, scales, bias, output)
        own = (expected.to(dtype).double() - expected).norm()  # of one rounding
        assert (output.double() - expected).norm() <= 1.1 * own + 1e-6 * expected.norm()
    assert wide[:, : len(weight)].isnan().all() and wide[:, 2 * len(weight) :].isnan().all()


@pytest.mark.parametrize("size", SIZES)
def test_rows_go_through_gelu_into_the_next_product(size):
    x, weight, scales, bias = tensors(*size)
    numbers, row_scales = int8.quantize_rows(x)
    sums = int8.int8_products(numbers, weight)
    wide = torch.empty(sums.shape)
    int8.dequantize(sums, row_scales, scales, bias, wide)
    hidden = F.gelu(wide.double(), approximate="tanh")
    result, result_scales = int8.gelu_quantize_rows(sums, row_scales, scales, bias)
    expected = hidden.abs().amax(1) / 127
    assert torch.allclose(result_scales.double(), expected, rtol=1e-5)
    error = (result.double() * result_scales[:, None].double() - hidden).abs()
    assert (error <= expected[:, None] * 0.501).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(bad):
    x, weight, scales, bias = tensors(5, 16, 8)
    x[3, 2] = bad
    numbers, row_scales = int8.quantize_rows(x)
    output = torch.empty(5, 8)
    int8.dequantize(int8.int8_products(numbers, weight), row_scales, scales, bias, output)
    assert output[3].isnan().all() and output[[0, 1, 2, 4]].isfinite().all()


def test_a_row_of_zeros_gives_the_bias():
    x, weight, scales, bias = tensors(2, 16, 8)
    numbers, row_scales = int8.quantize_rows(x.zero_())
    output = torch.empty(2, 8)
    int8.dequantize(int8.int8_products(numbers, weight), row_scales, scales, bias, output)
    assert torch.equal(output, bias.expand(2, 8)) and not row_scales.any()
