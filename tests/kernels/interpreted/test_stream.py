"""The stream operations as Triton kernels, interpreted, against the formulas in fp64."""

import pytest
import torch
from cogvx_kernels import ops
from cogvx_kernels._triton import rows
from cogvx_kernels.adaln import triton as kernels

from tests.kernels.budget import assert_within_budget, randn

from .conftest import guarded

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# batch, sequence, dim, text: one row, all text, no text, one row of text, and ends that no tile divides.
SHAPES = [(1, 1, 8, 0), (1, 1, 8, 1), (2, 7, 24, 3), (3, 9, 33, 9), (1, 5, 130, 0), (2, 6, 64, 1)]


def stream(*shape, dtype, seed):
    return guarded(randn(*shape, dtype=dtype, seed=seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples", ["one", "batch"])
@pytest.mark.parametrize(("batch", "sequence", "dim", "text"), SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_stream_operations(batch, sequence, dim, text, samples, dtype, affine, outputs):
    x, y = stream(batch, sequence, dim, dtype=dtype, seed=0) * 3 + 1, stream(batch, sequence, dim, dtype=dtype, seed=1)
    # Vectors as they lie in the modulation table: neither axis but the last is contiguous.
    table = stream(1 if samples == "one" else batch, 2, 3, dim, dtype=dtype, seed=2)
    shift, scale, gate = table.unbind(2)
    weight = stream(dim, dtype=dtype, seed=3) if affine else None
    bias = stream(dim, dtype=dtype, seed=4) if affine else None
    assert_within_budget(ops.layer_norm_modulate, (guarded(x), weight, bias, shift, scale, text, 1e-5), "triton")
    assert_within_budget(ops.gated_residual, (guarded(x), y, gate, text), "triton")
    arguments = (guarded(x), y, gate, weight, bias, shift, scale, text, 1e-5)
    assert_within_budget(ops.gated_residual_layer_norm_modulate, arguments, "triton")
    assert len(outputs) == 4  # each buffer came from the guarded allocator


@pytest.mark.parametrize("config", range(len(rows.ROWS_CONFIGS)))
@pytest.mark.parametrize("text", [0, 4, 5, 11])
def test_every_number_of_rows_gives_the_same(config, text, monkeypatch):
    x, y = (stream(2, 11, 24, dtype=torch.float32, seed=seed) for seed in (0, 1))
    shift, scale, gate = stream(2, 3, 2, 24, dtype=torch.float32, seed=2).unbind(1)
    expected = ops.gated_residual_layer_norm_modulate(x, y, gate, None, None, shift, scale, text)
    kernel = kernels.gated_residual_layer_norm_modulate_kernel
    monkeypatch.setattr(kernel, "configs", {target: [rows.ROWS_CONFIGS[config]] for target in kernel.configs})
    output = ops.gated_residual_layer_norm_modulate(x, y, gate, None, None, shift, scale, text, impl="triton")
    for got, truth in zip(output, expected, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-5)


def test_a_stream_that_is_not_contiguous_is_copied_first():
    x = stream(1, 24, 6, dtype=torch.float32, seed=0).transpose(1, 2)[..., ::2]
    y, vectors = stream(1, 6, 12, dtype=torch.float32, seed=1), stream(1, 2, 12, dtype=torch.float32, seed=2)
    with pytest.raises(ValueError, match="last axis is contiguous"):
        ops.gated_residual(x, y, vectors, 2, impl="triton")
    wider = stream(1, 6, 24, dtype=torch.float32, seed=3)[..., :12]
    assert_within_budget(ops.gated_residual, (wider, y, vectors, 2), "triton")
