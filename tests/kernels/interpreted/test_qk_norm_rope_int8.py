"""LayerNorm, rotation and quantization of Q and K as Triton kernels, interpreted, against the formula."""

import pytest
import torch
from cogvx_kernels import ops

from tests.kernels.budget import randn

from .conftest import guarded

# batch, sequence, heads, head_dim, text: one row, nothing but text, no text, a tail behind a whole block.
SHAPES = [(1, 1, 1, 64, 0), (3, 5, 2, 32, 5), (1, 131, 1, 64, 0), (2, 37, 2, 64, 3), (1, 12, 1, 16, 1)]


def inputs(batch, sequence, heads, head_dim, text, dtype, rotates, affine):
    packed = guarded(randn(batch, sequence, 3, heads, head_dim, dtype=dtype, seed=0) * 2 + 1)
    angles = torch.rand(sequence - text, head_dim // 2, generator=torch.Generator().manual_seed(1)) * 6
    angles = angles.repeat_interleave(2, 1)
    rotary = (guarded(angles.cos()), guarded(angles.sin())) if rotates else None
    vectors = [guarded(randn(head_dim, dtype=dtype, seed=seed)) if affine else None for seed in range(2, 6)]
    return (*packed.unbind(2)[:2], *vectors, rotary, text, 1e-6, 0.3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rotates", "affine"), [(True, True), (False, False)])
@pytest.mark.parametrize("shape", SHAPES)
def test_qk_norm_rope_int8(shape, rotates, affine, dtype):
    arguments = inputs(*shape, dtype, rotates, affine)
    expected = ops.qk_norm_rope_int8(*arguments)
    output = ops.qk_norm_rope_int8(*arguments, impl="triton")
    for values, truth in zip(output[::2], expected[::2], strict=True):
        assert values.shape == truth.shape and values.dtype == torch.int8
        # Sums are taken in another order: a number half way between two integers may go either way.
        assert (values.int() - truth.int()).abs().max() <= 1
        assert (values != truth).float().mean() < 0.01
    for scales, truth in zip(output[1::2], expected[1::2], strict=True):
        torch.testing.assert_close(scales, truth, rtol=2**-10, atol=1e-12)


def test_it_is_what_the_two_operations_give():
    """But for their rounding in between, which may move a number by one step of 127, and its block's scale a little."""
    arguments = inputs(1, 131, 2, 64, 3, torch.float16, True, True)
    one = ops.qk_norm_rope_int8(*arguments, impl="triton")
    two = ops.quantize_qk(*ops.qk_norm_rope(*arguments[:-1], impl="triton"), 0.3, impl="triton")
    for got, expected in zip(one, two, strict=True):
        difference = (got.double() - expected.double()).abs()
        assert (difference <= (1 if got.dtype == torch.int8 else 2e-3 * expected)).all()
        assert got.dtype != torch.int8 or (difference > 0).double().mean() < 0.05


def test_refusals():
    x = torch.zeros(1, 4, 2, 64)
    with pytest.raises(ValueError, match="key must have the shape of query"):
        ops.qk_norm_rope_int8(x, x[:, :2], None, None, None, None, None, 1)
    with pytest.raises(ValueError, match=r"qk_norm_rope_int8: scale must be positive, got 0"):
        ops.qk_norm_rope_int8(x, x, None, None, None, None, None, 1, 1e-6, 0.0)
    with pytest.raises(ValueError, match="head dims that are powers of two, got 34"):
        ops.qk_norm_rope_int8(x[..., :34], x[..., :34], None, None, None, None, None, 1, impl="triton")
    with pytest.raises(ValueError, match="head dims up to 64, got 128; use qk_norm_rope and quantize_qk"):
        ops.qk_norm_rope_int8(*[torch.zeros(1, 4, 2, 128)] * 2, None, None, None, None, None, 1, impl="triton")
