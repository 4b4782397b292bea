"""The graph of a block on a GPU, traced over fake CUDA tensors: it builds, and launches few kernels."""

import pytest
import torch
from cogvx_kernels.triton import why_not
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch._subclasses.fake_tensor import FakeTensorMode

from cogvx_fast.attention import CAPABILITIES, AttentionBackend
from cogvx_fast.transformer.block import FastCogVideoXBlock
from cogvx_fast.transformer.modulation import NormModulation
from cogvx_fast.transformer.plan import BlockPlan, FusedFeedForward, GeluLinear, MergedLinear

if why_not() is not None:
    pytest.skip(why_not(), allow_module_level=True)

from cogvx_kernels import aot

HEADS, HEAD_DIM, TEXT, TOKENS = 30, 64, 226, 300
DIM = HEADS * HEAD_DIM
MOST_KERNELS = 9


def block_inputs(rotary):
    """A block as the engine runs it on a GPU, its parameters and inputs, all fake."""
    with torch.device("meta"):
        reference = CogVideoXBlock(dim=DIM, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, time_embed_dim=512)
        block = FastCogVideoXBlock(reference)
    with FakeTensorMode(), torch.device("cuda"):
        parameters = {name: torch.empty(p.shape, dtype=torch.float16) for name, p in block.named_parameters()}
        stream = torch.empty(2, TOKENS, DIM, dtype=torch.float16)
        table = [torch.empty(1, 2, DIM, dtype=torch.float16) for _ in range(6)]
        qkv = [torch.empty(3 * DIM, DIM, dtype=torch.float16), torch.empty(3 * DIM, dtype=torch.float16)]
        angles = [torch.empty(TOKENS - TEXT, HEAD_DIM) for _ in range(2)] if rotary else []
    block.attn1.processor.backend = CAPABILITIES[AttentionBackend.TRITON]
    return block, (parameters, stream, table, qkv, angles)


def runner(block, fuse_gelu=True):
    def run(parameters, stream, table, qkv, angles):
        vectors = NormModulation(*table[:3]), NormModulation(*table[3:])
        names = ("ff.net.0.proj.weight", "ff.net.0.proj.bias"), ("ff.net.2.weight", "ff.net.2.bias")
        first, second = ([parameters[name] for name in pair] for pair in names)
        ff = FusedFeedForward(GeluLinear(*first), MergedLinear(*second)) if fuse_gelu else None
        plan = BlockPlan(impl="triton", qkv=MergedLinear(*qkv), ff=ff)
        arguments = (stream, vectors, TEXT, tuple(angles) or None, None, plan)
        return torch.func.functional_call(block, parameters, arguments)

    return run


@pytest.mark.parametrize("rotary", [False, True])
def test_a_block_launches_few_kernels(rotary):
    block, inputs = block_inputs(rotary)
    launched = aot.kernel_names(aot.trace(runner(block), *inputs))
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
    block, inputs = block_inputs(rotary=True)
    assert len(aot.kernel_names(aot.trace(runner(block, fuse_gelu=False), *inputs))) == MOST_KERNELS + 1


def test_attention_in_8_bits_is_one_more():
    block, inputs = block_inputs(rotary=True)
    block.attn1.processor.backend = CAPABILITIES[AttentionBackend.TRITON_INT8]
    launched = aot.kernel_names(aot.trace(runner(block), *inputs))
    assert launched[2:5] == ["key_norm_rope_sums", "qk_norm_rope_int8", "int8_attention"]
    assert len(launched) == MOST_KERNELS + 1
