"""Attention as a Triton kernel, interpreted, against the formula in fp64."""

import pytest
import torch
from cogvx_kernels import ops
from cogvx_kernels.attention import triton as kernels

from tests.kernels.budget import assert_within_budget, randn

from .conftest import guarded

DTYPES = [torch.float16, torch.bfloat16]
# batch, queries, keys, heads, head_dim: one of each, tails of queries and of keys, whole tiles, more than one.
SHAPES = [
    (1, 1, 1, 1, 64),
    (2, 5, 3, 2, 64),
    (1, 130, 64, 1, 64),
    (1, 17, 200, 2, 64),
    (3, 9, 129, 1, 128),
    (1, 128, 65, 1, 128),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.1, 1.0, 8.0])
@pytest.mark.parametrize(("batch", "queries", "keys", "heads", "head_dim"), SHAPES)
def test_attention(batch, queries, keys, heads, head_dim, spread, dtype):
    query = guarded(randn(batch, queries, heads, head_dim, dtype=dtype, seed=0) * spread)
    packed = guarded(randn(batch, keys, 3, heads, head_dim, dtype=dtype, seed=1) * spread)
    assert_within_budget(ops.attention, (query, packed[:, :, 1], packed[:, :, 2] + 1), "triton")


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("length", [63, 300])
def test_every_configuration_gives_the_same(head_dim, length, monkeypatch):
    query, key, value = (guarded(randn(1, length, 1, head_dim, dtype=torch.float16, seed=seed)) for seed in range(3))
    expected = ops.attention(query.double(), key.double(), value.double())
    tiles = {tuple(c.kwargs.values()): c for cs in kernels.CONFIGS[head_dim].values() for c in cs}
    assert len(tiles) > 1
    kernel = kernels.KERNELS[head_dim]
    for config in tiles.values():
        monkeypatch.setattr(kernel, "configs", {target: [config] for target in kernel.configs})
        output = ops.attention(query, key, value, impl="triton")
        torch.testing.assert_close(output.double(), expected, rtol=0, atol=2e-3)


def test_heads_before_tokens_and_a_scale():
    query, key, value = (
        guarded(randn(2, 3, 9, 64, dtype=torch.float16, seed=seed)).transpose(1, 2) for seed in range(3)
    )
    assert_within_budget(ops.attention, (query, key, value, 0.3), "triton")


def test_what_is_not_finite_stays_where_it_is():
    query, key, value = (randn(1, 9, 2, 64, dtype=torch.float16, seed=seed) for seed in range(3))
    query[0, 3, 1] = float("nan")
    output = ops.attention(query, key, value, impl="triton")
    assert output[0, 3, 1].isnan().all() and output[0, :, 0].isfinite().all() and output[0, 4:, 1].isfinite().all()


def test_refusals():
    x = torch.zeros(1, 4, 2, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match=r'impl="triton" takes torch.float16 or torch.bfloat16, head dims 64, 128'):
        ops.attention(x.float(), x.float(), x.float(), impl="triton")
    with pytest.raises(ValueError, match="head dim 32"):
        ops.attention(x[..., :32], x[..., :32], x[..., :32], impl="triton")
    with pytest.raises(ValueError, match=r"positive scale.* scale -1.0"):
        ops.attention(x, x, x, -1.0, impl="triton")
