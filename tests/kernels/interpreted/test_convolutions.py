"""The convolutions as Triton kernels, interpreted, against the formulas in fp64."""

import pytest
import torch
from cogvx_kernels import ops
from cogvx_kernels.conv3d import triton as kernels
from cogvx_kernels.conv3d import triton_taps as taps
from cogvx_kernels.conv3d import triton_upsample as upsample

from tests.kernels.budget import assert_within_budget, randn

from .conftest import guarded

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# batch, time, height, width, channels, out channels, kernel, size: one pixel, tiles whole, and ends of every kind.
SHAPES = [
    (1, 1, 1, 1, 16, 3, 3, 3),
    (2, 3, 5, 7, 24, 40, 3, 3),
    (1, 1, 8, 16, 64, 128, 3, 3),
    (1, 1, 13, 11, 18, 130, 3, 3),
    (2, 2, 3, 5, 20, 17, 1, 1),
    (1, 3, 4, 6, 72, 2, 1, 3),
]


def frames(*shape, dtype, seed):
    return guarded(randn(*shape, dtype=dtype, seed=seed))


def parameters(out_channels, *rest, dtype):
    fan_in = torch.Size(rest).numel()
    weight = randn(out_channels, *rest, dtype=torch.float32, seed=1) / fan_in**0.5
    return guarded(weight.to(dtype)), frames(out_channels, dtype=dtype, seed=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_past", [True, False])
@pytest.mark.parametrize(("batch", "time", "height", "width", "channels", "out", "kernel", "size"), SHAPES)
def test_causal_conv3d(batch, time, height, width, channels, out, kernel, size, with_past, dtype):
    x = frames(batch, time, height, width, channels, dtype=dtype, seed=0)
    weight, bias = parameters(out, channels, kernel, size, size, dtype=dtype)
    past = frames(batch, kernel - 1, height, width, channels, dtype=dtype, seed=3) if with_past else None
    residual = frames(batch, time, height, width, out, dtype=dtype, seed=4) if with_past else None
    assert_within_budget(ops.causal_conv3d, (x, weight, bias, past, residual), "triton")


@pytest.mark.parametrize("rows", [(0, 4), (2, 5), (3, 9)])
def test_rows_written_into_a_larger_tensor(rows):
    whole = frames(2, 5, 9, 6, 32, dtype=torch.float16, seed=0)
    past, x = whole[:, :2], whole[:, 2:]  # frames that lie where others begin
    weight, _ = parameters(20, 32, 3, 3, 3, dtype=torch.float16)
    weight = weight.contiguous(memory_format=torch.channels_last_3d)
    height = rows[1] - rows[0]
    around = torch.full((2, 4, height + 2, 7, 20), float("nan"), dtype=torch.float16)
    residual = frames(2, 3, 9, 6, 20, dtype=torch.float16, seed=4)[:, :, rows[0] : rows[1]]

    def operation(x, weight, past, residual, impl):
        out = around.to(x.dtype)[:, 1:, 1:-1, 1:]
        result = ops.causal_conv3d(x, weight, None, past, residual, out, rows, impl)
        assert result is out
        assert out._base.isnan().sum() == out._base.numel() - out.numel()
        return out

    assert_within_budget(operation, (x, weight, past, residual), "triton")


def test_a_past_is_what_the_frames_before_are():
    x = frames(1, 5, 3, 4, 16, dtype=torch.float32, seed=0)
    weight, bias = parameters(16, 16, 3, 3, 3, dtype=torch.float32)
    whole = ops.causal_conv3d(x, weight, bias, impl="triton")
    parts = [ops.causal_conv3d(x[:, :3], weight, bias, impl="triton")]
    parts.append(ops.causal_conv3d(x[:, 3:], weight, bias, x[:, 1:3], impl="triton"))
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_a_frame_that_is_not_finite_reaches_two_more():
    x = frames(1, 5, 2, 2, 16, dtype=torch.float16, seed=0)
    x[0, 1] = float("nan")
    weight, bias = parameters(16, 16, 3, 3, 3, dtype=torch.float16)
    output = ops.causal_conv3d(x, weight, bias, impl="triton")
    assert output.isfinite().all(dim=-1).all(dim=-1).all(dim=-1).tolist() == [[True, False, False, False, True]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("doubles", [True, False])
@pytest.mark.parametrize(
    ("batch", "time", "shape"), [(1, 1, (1, 1, 16, 16)), (2, 2, (3, 5, 24, 130)), (1, 3, (4, 3, 64, 20))]
)
def test_upsample_conv2d(batch, time, shape, doubles, dtype):
    height, width, channels, out = shape
    x = frames(batch, time, height, width, channels, dtype=dtype, seed=0)
    weight, bias = parameters(out, channels, 3, 3, dtype=dtype)
    assert_within_budget(ops.upsample_conv2d, (x, weight, bias, doubles), "triton")


@pytest.mark.parametrize("kind", taps.CONFIGS)
def test_every_configuration_gives_the_same(kind, monkeypatch):
    dtype = torch.float32 if kind == "float32" else torch.float16
    x = frames(1, 1, 11, 12, 34, dtype=dtype, seed=0)
    weight, bias = parameters(8, 34, 3, 3, 3, dtype=dtype)
    expected = ops.causal_conv3d(x.double(), weight.double(), bias.double())
    upsampled = ops.upsample_conv2d(x.double(), weight[:, :, 0].double(), bias.double(), True)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    tiles = {tuple(config.kwargs.values()): config for configs in taps.CONFIGS[kind].values() for config in configs}
    monkeypatch.setattr(kernels, "kind_of", lambda *_: kind)
    monkeypatch.setattr(upsample, "kind_of", lambda *_: kind)
    for config in tiles.values():
        for kernel in (kernels.KERNELS[kind], upsample.KERNELS[kind]):
            monkeypatch.setattr(kernel, "configs", {target: [config] for target in kernel.configs})
        output = ops.causal_conv3d(x, weight, bias, impl="triton")
        torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
        output = ops.upsample_conv2d(x, weight[:, :, 0], bias, True, impl="triton")
        torch.testing.assert_close(output.double(), upsampled, rtol=tolerance, atol=tolerance)


def test_refusals():
    x, weight = torch.zeros(1, 2, 3, 3, 16), torch.zeros(8, 16, 3, 3, 3)
    with pytest.raises(
        ValueError, match=r'impl="triton" takes tensors of one dtype .* got torch.float16, torch.float32'
    ):
        ops.causal_conv3d(x, weight.half(), impl="triton")
    with pytest.raises(ValueError, match="and 5x5"):
        ops.causal_conv3d(x, torch.zeros(8, 16, 1, 5, 5), impl="triton")
    with pytest.raises(ValueError, match="whose last axis is contiguous"):
        ops.causal_conv3d(x, weight, out=torch.zeros(1, 2, 8, 3, 3).permute(0, 1, 3, 4, 2), impl="triton")
