"""The graph of a block on a GPU, traced over fake CUDA tensors: it builds, and launches few kernels."""

import pytest
import torch
from cogvx_kernels._triton import why_unavailable

from cogvx_fast.attention import AttentionBackend
from cogvx_fast.transformer.launches import MOST_KERNELS, block_kernels

pytestmark = pytest.mark.slow

if why_unavailable() is not None:
    pytest.skip(why_unavailable(), allow_module_level=True)

HEADS = 30


@pytest.mark.parametrize("rotary", [False, True])
def test_a_block_launches_few_kernels(rotary):
    launched = block_kernels(HEADS, rotary=rotary)
    assert launched == [
        "addmm",
        "qk_norm_rope",
        "attention",
        "addmm",
        "gated_residual_layer_norm_modulate",
        "_addmm_activation",
        "addmm",
        "gated_residual_layer_norm_modulate",
    ]
    assert len(launched) < MOST_KERNELS


def test_the_last_block_leaves_the_stream_alone():
    whole, last = block_kernels(HEADS), block_kernels(HEADS, last=True)
    assert last == [*whole[:-1], "gated_residual"]


def test_without_the_fused_gelu_it_is_one_more():
    assert len(block_kernels(HEADS, fuse_gelu=False)) == len(block_kernels(HEADS)) + 1


@pytest.mark.parametrize("quantized", [torch.int8, torch.float8_e4m3fn])
def test_products_in_8_bits_quantize_only_what_attention_gives(quantized):
    launched = block_kernels(HEADS, quantized=quantized)
    assert launched == [
        "scaled_linear",
        "qk_norm_rope",
        "attention",
        "quantize_rows",
        "scaled_linear",
        "gated_residual_layer_norm_modulate",
        "scaled_linear",
        "scaled_linear",
        "gated_residual_layer_norm_modulate",
    ]
    assert len(launched) <= MOST_KERNELS


@pytest.mark.parametrize("quantized", [None, torch.int8])
def test_attention_in_8_bits_is_none_more(quantized):
    plain = block_kernels(HEADS, quantized=quantized)
    launched = block_kernels(HEADS, backend=AttentionBackend.TRITON_INT8, quantized=quantized)
    in_8_bits = {"qk_norm_rope": "qk_norm_rope_int8", "attention": "int8_attention"}
    assert launched == [in_8_bits.get(name, name) for name in plain]
