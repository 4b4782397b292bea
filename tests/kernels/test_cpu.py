"""The C++ operations for CPUs against the formulas in fp64; the budget is the torch implementation's own error."""

import pytest
import torch
from cogvx_kernels import ops
from cogvx_kernels.adaln import cpu as stream
from cogvx_kernels.attention import cpu as attention
from cogvx_kernels.packed_linear import cpu as linear

from tests.kernels.budget import assert_within_budget, randn

needs_compiler = pytest.mark.skipif(stream.why_unavailable() is not None, reason=str(stream.why_unavailable()))
SHAPES = [(1, 1, 8, 0), (1, 1, 8, 1), (2, 7, 24, 3), (3, 33, 64, 33), (2, 65, 130, 0)]  # batch, sequence, dim, text
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Fresh memory holds NaN, so that what an operation forgets to write is seen."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ["one", "batch"])
@pytest.mark.parametrize(("batch", "sequence", "dim", "text"), SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_stream_operations(batch, sequence, dim, text, rows, dtype, affine):
    x, y = randn(batch, sequence, dim, dtype=dtype, seed=0) * 3 + 1, randn(batch, sequence, dim, dtype=dtype, seed=1)
    # Vectors as they lie in the modulation table: neither axis but the last is contiguous.
    table = randn(1 if rows == "one" else batch, 2, 3, dim, dtype=dtype, seed=2)
    shift, scale, gate = table.flip(1).unbind(2)
    weight = randn(dim, dtype=dtype, seed=3) if affine else None
    bias = randn(dim, dtype=dtype, seed=4) if affine else None
    assert_within_budget(ops.layer_norm_modulate, (x, weight, bias, shift, scale, text, 1e-5), "cpu")
    assert_within_budget(ops.gated_residual, (x, y, gate, text), "cpu")
    arguments = (x, y, gate, weight, bias, shift, scale, text, 1e-5)
    assert_within_budget(ops.gated_residual_layer_norm_modulate, arguments, "cpu")


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize(
    ("batch", "sequence", "heads", "head_dim", "text"), [(1, 1, 1, 2, 0), (2, 9, 3, 64, 4), (1, 5, 2, 34, 5)]
)
def test_norm_rope(batch, sequence, heads, head_dim, text, rotates, dtype):
    x = randn(batch, sequence, 3, heads, head_dim, dtype=dtype, seed=0)[:, :, 1]  # a part of the packed projection
    angles = torch.rand(sequence - text, head_dim, generator=torch.Generator().manual_seed(1)) * 6
    rotary = (angles.cos(), angles.sin()) if rotates else None
    weight, bias = randn(head_dim, dtype=dtype, seed=2), randn(head_dim, dtype=dtype, seed=3)
    assert_within_budget(ops.norm_rope, (x, weight, bias, rotary, text, 1e-6), "cpu")


@needs_compiler
def test_nan_stays_nan():
    x = torch.tensor([[[1.0, float("nan"), 2.0, 3.0], [1.0, 2.0, 3.0, 5.0]]], dtype=torch.bfloat16)
    gate = torch.ones(1, 2, 4, dtype=torch.bfloat16)
    output = ops.gated_residual(x, x, gate, 1, impl="cpu")
    assert output[0, 0].isnan().tolist() == [False, True, False, False] and output[0, 1].isfinite().all()


@needs_compiler
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (3, 17), (5, 256)])
def test_bias_gelu(rows, dim):
    x, bias = randn(rows, dim, dtype=torch.float32, seed=0) * 4, randn(dim, dtype=torch.float32, seed=1)
    truth = torch.nn.functional.gelu(x.double() + bias.double(), approximate="tanh")
    own = torch.nn.functional.gelu(x + bias, approximate="tanh")
    output = x.clone()
    linear.bias_gelu_(output, bias)
    error, reference = ((o.double() - truth).norm() / truth.norm() for o in (output, own))
    assert error <= 1.1 * reference + 1e-7


@needs_compiler
def test_bias_gelu_at_the_ends():
    x = torch.tensor([[-1e30, -60.0, -0.0, 60.0, 1e30, float("inf"), float("nan")]])
    linear.bias_gelu_(x, torch.zeros(7))
    assert x[0, :3].abs().max() == 0 and x[0, 3:6].tolist() == [60.0, float(torch.tensor(1e30)), float("inf")]
    assert x[0, 6].isnan()


def where_it_runs(impl):
    reason = attention.why_unavailable(impl)
    return pytest.param(impl, marks=[] if reason is None else pytest.mark.skip(reason))


by_each = pytest.mark.parametrize("impl", [where_it_runs(impl) for impl in attention.IMPLEMENTATIONS])


@by_each
@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads"),
    [(1, 1, 1, 1), (1, 5, 5, 2), (2, 31, 33, 3), (1, 64, 200, 2), (1, 300, 17, 2), (2, 129, 257, 5), (1, 2, 1216, 1)],
)
@pytest.mark.parametrize("spread", [0.1, 1.0, 8.0])
def test_attention(impl, batch, queries, keys, heads, spread):
    query = randn(batch, queries, heads, 64, dtype=torch.bfloat16, seed=0) * spread
    packed = randn(batch, keys, 3, heads, 64, dtype=torch.bfloat16, seed=1) * spread
    assert_within_budget(ops.attention, (query, packed[:, :, 1], packed[:, :, 2] + 1), impl)


@pytest.mark.parametrize("impl", [where_it_runs("amx")])
def test_attention_beside_other_users_of_tiles(impl):
    """oneDNN's matrix products use AMX tiles too, with a configuration of their own."""
    query = randn(2, 200, 3, 64, dtype=torch.bfloat16, seed=0)
    weight = randn(256, 192, dtype=torch.bfloat16, seed=1)
    expected_product = query.flatten(2) @ weight.T
    expected = ops.attention(query, query, query, impl=impl)
    for _ in range(3):
        assert torch.equal(query.flatten(2) @ weight.T, expected_product)
        assert torch.equal(ops.attention(query, query, query, impl=impl), expected)


@by_each
def test_attention_of_what_is_not_finite(impl):
    query = randn(1, 20, 2, 64, dtype=torch.bfloat16, seed=0)
    bad = query.clone()
    bad[0, 3, 1] = float("nan")
    output = ops.attention(bad, query, query, impl=impl)
    assert output[0, 3, 1].isnan().all() and output[0, :, 0].isfinite().all() and output[0, 4:, 1].isfinite().all()


def test_attention_refuses_what_it_does_not_take():
    x = torch.zeros(1, 4, 2, 64)
    for impl in attention.IMPLEMENTATIONS:
        with pytest.raises(ValueError, match=rf'impl="{impl}" takes bfloat16 and head dim 64, got torch.float32'):
            ops.attention(x, x, x, impl=impl)
    with pytest.raises(ValueError, match="at least one key"):
        ops.attention(x, x[:, :0], x[:, :0])
    with pytest.raises(ValueError, match="impl='fast' is unknown to attention; allowed: 'torch', 'amx'"):
        ops.attention(x, x, x, impl="fast")


def test_stream_operations_refuse_what_they_do_not_take():
    x, vectors = torch.zeros(1, 4, 8), torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match=r'impl="cpu" takes tensors of one dtype.*torch.bfloat16, torch.float32'):
        ops.gated_residual(x, x, vectors.bfloat16(), 0, impl="cpu")
    with pytest.raises(ValueError, match="contiguous stream"):
        ops.layer_norm_modulate(x.transpose(1, 2), None, None, vectors[..., :4], vectors[..., :4], 0, impl="cpu")
    with pytest.raises(ValueError, match="rotary must be two tables"):
        ops.norm_rope(x[..., None, :], None, None, (x[0], x[0]), 1)


@pytest.mark.skipif(linear.why_unavailable() is not None, reason=str(linear.why_unavailable()))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_linear(dtype, gelu, bias):
    x, weight = randn(2, 37, 48, dtype=dtype, seed=0), randn(80, 48, dtype=dtype, seed=1)
    shift = randn(80, dtype=dtype, seed=2) if bias else None

    def formula(x, weight, shift):
        y = torch.nn.functional.linear(x, weight, shift)
        return torch.nn.functional.gelu(y, approximate="tanh") if gelu else y

    truth = formula(*(None if t is None else t.double() for t in (x, weight, shift)))
    output = linear.packed_linear(x, linear.pack_linear(weight, 74), shift, gelu)
    error, own = ((o.double() - truth).norm() / truth.norm() for o in (output, formula(x, weight, shift)))
    assert output.shape == (2, 37, 80) and error <= 1.1 * own + 1e-7
