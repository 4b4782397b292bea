"""The operations against their formulas, written out row by row in fp64."""

import pytest
import torch
from cogvx_kernels import ops

SHAPES = [(1, 1, 8, 0), (1, 1, 8, 1), (2, 7, 24, 3), (3, 33, 64, 33), (2, 65, 130, 0)]  # batch, sequence, dim, text


def make(batch, sequence, dim, dtype, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    vectors = {name: randn(rows, 2, dim) for name in ("gate", "shift", "scale")}
    return randn(batch, sequence, dim) * 3 + 1, randn(batch, sequence, dim), randn(dim), randn(dim), vectors


def by_row(x, y, weight, bias, vectors, text_length, eps):
    """The formula for one row after the other, in fp64."""
    x, y, weight, bias = (t.double() for t in (x, y, weight, bias))
    residual, normed = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
    for b in range(x.shape[0]):
        for s in range(x.shape[1]):
            expert = 0 if s < text_length else 1
            gate, shift, scale = (
                vectors[name][b % vectors[name].shape[0], expert].double() for name in ("gate", "shift", "scale")
            )
            row = x[b, s] + gate * y[b, s]
            centered = row - row.mean()
            standard = centered / (centered.square().mean() + eps).sqrt()
            residual[b, s] = row
            normed[b, s] = (standard * weight + bias) * (1 + scale) + shift
    return residual, normed


@pytest.mark.parametrize("rows", ["one", "batch"])
@pytest.mark.parametrize(("batch", "sequence", "dim", "text_length"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_against_the_formula(batch, sequence, dim, text_length, dtype, rows):
    x, y, weight, bias, vectors = make(batch, sequence, dim, dtype, batch if rows == "batch" else 1)
    residual, _ = by_row(x, y, weight, bias, vectors, text_length, 1e-5)
    got_residual, got_normed = ops.gated_residual_layer_norm_modulate(
        x, y, vectors["gate"], weight, bias, vectors["shift"], vectors["scale"], text_length
    )
    assert torch.equal(ops.gated_residual(x, y, vectors["gate"], text_length), got_residual)
    # One rounding of the result, and for the norm one more of its input, amplified by at most 1 / deviation.
    eps = torch.finfo(dtype).eps
    assert (got_residual.double() - residual).abs().max() <= 2 * eps * residual.abs().max()
    _, expected = by_row(
        got_residual, torch.zeros_like(y), weight, bias, {**vectors, "gate": vectors["gate"] * 0}, text_length, 1e-5
    )
    budget = 2 * eps if dtype in (torch.float16, torch.bfloat16) else 64 * eps
    assert (got_normed.double() - expected).abs().max() <= budget * expected.abs().max()
    again = ops.layer_norm_modulate(got_residual, weight, bias, vectors["shift"], vectors["scale"], text_length)
    assert torch.equal(again, got_normed)


def test_no_affine_is_an_affine_of_one_and_zero():
    x, _, _, _, vectors = make(2, 5, 16, torch.float32, 1)
    without = ops.layer_norm_modulate(x, None, None, vectors["shift"], vectors["scale"], 2)
    affine = ops.layer_norm_modulate(x, torch.ones(16), torch.zeros(16), vectors["shift"], vectors["scale"], 2)
    assert torch.allclose(without, affine, atol=1e-6)


def test_errors_name_the_argument():
    x, y, weight, bias, v = make(2, 5, 16, torch.float32, 1)
    with pytest.raises(ValueError, match=r"impl='cuda'.*allowed: 'torch'"):
        ops.layer_norm_modulate(x, weight, bias, v["shift"], v["scale"], 2, impl="cuda")
    with pytest.raises(ValueError, match=r"text_length=6 must lie in 0\.\.5"):
        ops.gated_residual(x, y, v["gate"], 6)
    with pytest.raises(ValueError, match=r"scale must be \(1 or 2, 2, 16\), got shape \(3, 2, 16\)"):
        ops.layer_norm_modulate(x, weight, bias, v["shift"], v["scale"].expand(3, -1, -1), 2)
    with pytest.raises(ValueError, match=r"x must be \(batch, sequence, dim\)"):
        ops.layer_norm_modulate(x[0], weight, bias, v["shift"], v["scale"], 2)
    with pytest.raises(ValueError, match=r"y must have the shape of x"):
        ops.gated_residual(x, y[:, :4], v["gate"], 2)
