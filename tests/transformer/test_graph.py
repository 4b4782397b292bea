"""The graph of a block on a GPU, traced over fake CUDA tensors: it builds, and launches few kernels."""

import pytest
from cogvx_kernels.triton import why_not

from cogvx_fast.attention import AttentionBackend
from cogvx_fast.transformer.launches import MOST_KERNELS, block_kernels

if why_not() is not None:
    pytest.skip(why_not(), allow_module_level=True)

HEADS = 30


@pytest.mark.parametrize("rotary", [False, True])
def test_a_block_launches_few_kernels(rotary):
    launched = block_kernels(HEADS, rotary=rotary)
    assert launched == [
        "layer_norm_modulate",
        "addmm",
        "qk_norm_rope",
        "attention",
        "addmm",
        "gated_residual_layer_norm_modulate",
        "_addmm_activation",
        "addmm",
        "gated_residual",
    ]
    assert len(launched) <= MOST_KERNELS


def test_without_the_fused_gelu_it_is_one_more():
    assert len(block_kernels(HEADS, fuse_gelu=False)) == MOST_KERNELS + 1


def test_attention_in_8_bits_is_one_more():
    launched = block_kernels(HEADS, backend=AttentionBackend.TRITON_INT8)
    assert launched[2:5] == ["key_norm_rope_sums", "qk_norm_rope_int8", "int8_attention"]
    assert len(launched) == MOST_KERNELS + 1
