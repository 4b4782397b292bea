"""LayerNorm and rotation of Q and K as a Triton kernel, interpreted, against the formulas in fp64."""

import pytest
import torch
from cogvx_kernels import ops

from tests.kernels.budget import assert_within_budget, randn

from .conftest import guarded

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# batch, sequence, heads, head_dim, text: one row, tails of every kind, no text and nothing but text.
SHAPES = [(1, 1, 1, 2, 0), (2, 9, 3, 64, 4), (3, 5, 2, 32, 5), (1, 7, 5, 128, 0), (1, 12, 3, 64, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("batch", "sequence", "heads", "head_dim", "text"), SHAPES)
def test_norm_rope(batch, sequence, heads, head_dim, text, rotates, affine, dtype):
    packed = guarded(randn(batch, sequence, 3, heads, head_dim, dtype=dtype, seed=0) * 2 + 1)
    query, key, _ = packed.unbind(2)
    angles = torch.rand(sequence - text, head_dim, generator=torch.Generator().manual_seed(1)) * 6
    rotary = (guarded(angles.cos()), guarded(angles.sin())) if rotates else None
    vectors = [guarded(randn(head_dim, dtype=dtype, seed=seed)) if affine else None for seed in range(2, 6)]
    assert_within_budget(ops.norm_rope, (query, *vectors[:2], rotary, text, 1e-6), "triton")
    assert_within_budget(ops.qk_norm_rope, (query, key, *vectors, rotary, text, 1e-6), "triton")


def test_q_and_k_may_lie_apart():
    query = guarded(randn(2, 6, 3, 64, dtype=torch.float32, seed=0))
    key = guarded(randn(2, 3, 6, 64, dtype=torch.float32, seed=1)).transpose(1, 2)
    assert_within_budget(ops.qk_norm_rope, (query, key, None, None, None, None, None, 2, 1e-6), "triton")


def test_refusals():
    x = torch.zeros(1, 4, 2, 34)
    with pytest.raises(ValueError, match="head dims that are powers of two, got 34"):
        ops.norm_rope(x, None, None, None, 1, impl="triton")
    with pytest.raises(ValueError, match="key must have the shape of query"):
        ops.qk_norm_rope(x, x[:, :2], None, None, None, None, None, 1, impl="triton")
