"""Quantization of rows and the 8-bit linear layer: the formulas, on numbers written out."""

import pytest
import torch
import torch.nn.functional as F
from cogvx_kernels import ops


def test_halves_are_rounded_to_even_and_the_largest_is_127():
    numbers, scales = ops.quantize_rows(
        torch.tensor([[-127.0, 0.5, 1.5, 2.5, -0.5, 126.5], [0, 0, 0, 0, 0, 254]]), torch.int8
    )
    assert numbers.tolist() == [[-127, 0, 2, 2, 0, 126], [0, 0, 0, 0, 0, 127]] and scales.tolist() == [1, 2]


def test_e4m3_has_448_at_the_top_and_three_bits_behind_the_first():
    numbers, scales = ops.quantize_rows(torch.tensor([[896.0, -2.0, 34.0, 38.0]]), torch.float8_e4m3fn)
    assert numbers.float().tolist() == [[448, -1, 16, 20]] and scales.tolist() == [2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_group_has_a_scale_of_its_own(dtype):
    x = torch.randn(2, 3, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[..., 128:256] *= 100
    numbers, scales = ops.quantize_rows(x, torch.int8, grouped=True)
    assert scales.shape == (2, 3, 3) and numbers.is_contiguous()
    for group, columns in enumerate((slice(0, 128), slice(128, 256), slice(256, 300))):
        alone = ops.quantize_rows(x[..., columns], torch.int8)
        assert torch.equal(numbers[..., columns], alone[0]) and torch.equal(scales[..., group], alone[1])


def test_the_layer_is_that_of_the_restored_operands():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((2, 5, 300), (70, 300), (70,)))
    weight = ops.quantize_rows(weight, torch.int8)
    for grouped in (False, True):
        numbers, scales = ops.quantize_rows(x, torch.int8, grouped)
        steps = scales.repeat_interleave(128, -1)[..., :300] if grouped else scales[..., None]
        restored = F.linear(numbers * steps.double(), weight[0] * weight[1].double()[:, None], bias.double())
        output = ops.scaled_linear(numbers, scales, *weight, bias, "gelu_tanh", torch.float32)
        torch.testing.assert_close(output.double(), F.gelu(restored, approximate="tanh"), rtol=1e-6, atol=1e-6)
        in_8_bits = ops.scaled_linear(numbers, scales, *weight, bias, "gelu_tanh", torch.int8)
        assert all(map(torch.equal, in_8_bits, ops.quantize_rows(output, torch.int8, grouped=True)))


def test_a_norm_is_quantized_from_fp32():
    generator = torch.Generator().manual_seed(0)
    x, vectors = torch.randn(2, 7, 64, generator=generator), torch.randn(1, 2, 64, generator=generator)
    half = [tensor.bfloat16() for tensor in (x, vectors)]
    numbers, scales = ops.layer_norm_modulate(half[0], None, None, half[1], half[1], 3, quantize=torch.int8)
    wide = ops.layer_norm_modulate(half[0].float(), None, None, half[1].float(), half[1].float(), 3)
    assert all(map(torch.equal, (numbers, scales), ops.quantize_rows(wide, torch.int8)))
