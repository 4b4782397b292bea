"""C++ is handed nothing that it would read or write past its end."""

import pytest
import torch
from cogvx_kernels import ops
from cogvx_kernels._cpp.arguments import operand, optional
from cogvx_kernels.adaln import cpu as stream
from cogvx_kernels.attention import cpu as attention
from cogvx_kernels.conv3d import direct as convolution
from cogvx_kernels.conv3d import winograd
from cogvx_kernels.group_norm import cpu as frames
from cogvx_kernels.packed_linear import bias_gelu_
from cogvx_kernels.qk_norm_rope.cpu import norm_rope
from cogvx_kernels.w8a8_linear import cpu as int8

F32, BF16 = torch.float32, torch.bfloat16
needs_compiler = pytest.mark.skipif(stream.why_unavailable() is not None, reason=str(stream.why_unavailable()))


def test_an_operand_is_where_its_tensor_is():
    x = torch.zeros(2, 3, 4)
    assert operand("x", x, F32, (2, 3, 4)).value == x.data_ptr()
    assert operand("x", x[:, 1], (BF16, F32), (2, 4), strided=1).value == x[:, 1].data_ptr()
    assert operand("x", x.transpose(0, 1), F32, (3, 2, 4), strided=2).value == x.data_ptr()
    assert operand("x", x[:, :1], F32, (2, 1, 4), strided=1).value, "an axis of one has no stride"
    assert operand("x", torch.zeros(2, 0, 4), F32, (2, 0, 4)).value is None
    assert optional("x", None, F32, (2, 3, 4)).value is None


@pytest.mark.parametrize(
    ("tensor", "strided", "message"),
    [
        (
            torch.zeros(2, 3, dtype=BF16),
            0,
            r"bias must be torch.float32 \(2, 3\) on a CPU, got torch.bfloat16 \(2, 3\)",
        ),
        (torch.zeros(6), 0, r"bias must be torch.float32 \(2, 3\) on a CPU, got torch.float32 \(6,\)"),
        (torch.zeros(2, 3, device="meta"), 0, r"\(2, 3\) on a CPU, got torch.float32 \(2, 3\) on meta"),
        (torch.zeros(3, 2).t(), 0, r"bias must be contiguous, got strides \(1, 2\) for \(2, 3\)"),
        (torch.zeros(2, 6)[:, ::2], 1, r"bias must be contiguous behind its first 1 axes, got strides \(6, 2\)"),
    ],
)
def test_any_other_tensor_is_refused(tensor, strided, message):
    with pytest.raises(ValueError, match=message):
        operand("bias", tensor, F32, (2, 3), strided)
    with pytest.raises(ValueError, match=message):
        optional("bias", tensor, F32, (2, 3), strided)


@needs_compiler
def test_the_stream():
    x, vectors = torch.zeros(2, 4, 8), torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match=r"x must be torch.bfloat16 or torch.float32 \(2, 4, 8\)"):
        stream.gated_residual(x.double(), x.double(), vectors.double(), 0)
    with pytest.raises(
        ValueError, match=r"y must be torch.float32 \(2, 4, 8\) on a CPU, got torch.float32 \(2, 3, 8\)"
    ):
        stream.gated_residual(x, x[:, :3], vectors, 0)
    with pytest.raises(ValueError, match=r"gate must be torch.float32 \(2, 2, 8\).*got torch.float32 \(3, 2, 8\)"):
        stream.gated_residual(x, x, vectors.expand(3, -1, -1), 0)
    with pytest.raises(ValueError, match=r"weight must be torch.float32 \(8,\).*got torch.float32 \(7,\)"):
        ops.layer_norm_modulate(x, x[0, 0, :7], None, vectors, vectors, 1, impl="cpu")
    with pytest.raises(ValueError, match=r"cosines must be torch.float32 \(3, 8\)"):
        norm_rope(x[:, :, None], None, None, x[0], x[0], 1, 1e-6)
    with pytest.raises(ValueError, match=r"even head dim"):
        norm_rope(x[:, :, None, :7], None, None, x[0, :, :7], x[0, :, :7], 0, 1e-6)
    with pytest.raises(ValueError, match=r"bias must be torch.float32 \(8,\)"):
        bias_gelu_(x[0], torch.zeros(7))


@needs_compiler
def test_frames():
    x, table = torch.zeros(1, 2, 3, 4, 8), torch.zeros(1, 1, 1, 1, 8)
    here = [torch.zeros(length, dtype=torch.int64) for length in x.shape[1:4]]
    with pytest.raises(ValueError, match=r"scale must be torch.float32 \(1, 1, 1, 1, 8\)"):
        frames.group_norm_modulate_silu(x, table.double(), table, *here, x.clone())
    with pytest.raises(ValueError, match=r"rows must be torch.int64 \(3,\) on a CPU, got torch.int32 \(3,\)"):
        frames.group_norm_modulate_silu(x, table, table, here[0], here[1].int(), here[2], x.clone())
    for axis, index in ((0, 1), (1, -1), (2, 7)):
        outside = [indices + index if i == axis else indices for i, indices in enumerate(here)]
        with pytest.raises(IndexError, match=r"an index lies outside of its table, \(1, 1, 1\)"):
            ops.group_norm_modulate_silu(x, table, table, *outside, x.clone(), impl="cpu")


@pytest.mark.skipif(convolution.why_unavailable() is not None, reason=str(convolution.why_unavailable()))
def test_convolutions():
    x, weight = torch.zeros(1, 3, 4, 5, 8), torch.zeros(16, 8, 3, 3, 3)
    out, bias = torch.zeros(1, 1, 2, 3, 16), torch.zeros(16)
    with pytest.raises(ValueError, match=r"weight must be torch.float32 .* got torch.float64"):
        convolution.pack(weight.double())
    with pytest.raises(ValueError, match=r"packed must be torch.float32 \(\d+,\).*got torch.float32 \(10,\)"):
        convolution.convolution(x, torch.zeros(10), bias, (3, 3, 3), out)
    with pytest.raises(ValueError, match=r"bias must be torch.float32 \(16,\).*got torch.bfloat16"):
        convolution.convolution(x, convolution.pack(weight), bias.bfloat16(), (3, 3, 3), out)
    with pytest.raises(ValueError, match=r"weight must be torch.float32 or torch.bfloat16 \(16, 8, 3, 3, 3\).*1, 3\)"):
        winograd.pack(weight[..., :1, :])
    with pytest.raises(ValueError, match=r"packed must be torch.float32"):
        # What was packed for the tiles of another dtype.
        winograd.convolution(x, winograd.pack(weight.bfloat16()), bias, 3, out)
    with pytest.raises(ValueError, match=r"bias must be torch.float32 \(16,\)"):
        winograd.convolution(x, winograd.pack(weight), bias[:8], 3, out)


@pytest.mark.skipif(int8.why_unavailable() is not None, reason=str(int8.why_unavailable()))
def test_products_in_8_bits():
    sums, by_row, by_column = torch.zeros(3, 8, dtype=torch.int32), torch.zeros(3), torch.zeros(8)
    with pytest.raises(ValueError, match=r"x must be torch.bfloat16 or torch.float32 \(3, 8\)"):
        int8.quantize_rows(torch.zeros(3, 8, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"output must be .* \(3, 8\) on a CPU, got torch.float32 \(3, 7\)"):
        int8.dequantize(sums, by_row, by_column, by_column, torch.zeros(3, 7))
    with pytest.raises(ValueError, match=r"row_scales must be torch.float32 \(3,\)"):
        int8.gelu_quantize_rows(sums, by_column, by_column, by_column)
    with pytest.raises(ValueError, match=r"bias must be torch.float32 \(8,\).*got torch.bfloat16"):
        int8.dequantize(sums, by_row, by_column, by_column.bfloat16(), torch.zeros(3, 8))


@pytest.mark.parametrize("impl", attention.IMPLEMENTATIONS)
def test_attention(impl):
    if (reason := attention.why_unavailable(impl)) is not None:
        pytest.skip(reason)
    query, key = torch.zeros(1, 3, 2, 64, dtype=BF16), torch.zeros(1, 5, 2, 64, dtype=BF16)
    with pytest.raises(ValueError, match=r"value must be torch.bfloat16 \(1, 5, 2, 64\).*got torch.bfloat16 \(1, 4, 2"):
        attention.attention(query, key, key[:, :4], 0.125, impl)
    with pytest.raises(ValueError, match=r"key must be torch.bfloat16 \(1, 5, 2, 64\).*got torch.float32"):
        attention.attention(query, key.float(), key, 0.125, impl)
