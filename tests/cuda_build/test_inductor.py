"""What `compile="blocks"` makes of a transformer block on GPUs that are not there: inductor's code, by a CUDA build.

Eager Triton takes a Python number as fp32, inductor as fp64: what compiles in the one need not in the other. So the
code is read, and each kernel in it compiled for the GPU with the types and constants that stand there. Inductor adds no
kernel of its own: a block is our launches and library products.
"""

import functools
import itertools

import pytest
import torch
from cogvx_kernels._triton import why_unavailable
from cogvx_kernels.inspect import machine_code
from cogvx_kernels.targets import TARGETS
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

if torch.version.cuda is None:
    pytest.skip("torch is built without CUDA, which inductor's code for a GPU needs", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("there is a GPU, so none is pretended", allow_module_level=True)
if (reason := why_unavailable() or machine_code.why_unavailable()) is not None:
    pytest.skip(reason, allow_module_level=True)

import triton
import triton.language as tl

from cogvx_fast.config import AttentionBackend
from cogvx_fast.plan import AttentionPlan
from cogvx_fast.transformer.binding import BoundBlock
from cogvx_fast.transformer.block import FastCogVideoXBlock, residual_norm
from cogvx_fast.transformer.launches import block_kernels
from cogvx_fast.transformer.linear import (
    CublasLtLinear,
    FeedForwardPair,
    MergedLinear,
    QuantizedRows,
    ScaledFeedForward,
    ScaledLinear,
)
from cogvx_fast.transformer.modulation import NormModulation

from .inductor import code_of, pretend

pytestmark = pytest.mark.slow

RECIPES = {"16-bit": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
ATTENTIONS = [AttentionBackend.SDPA, AttentionBackend.TRITON, AttentionBackend.TRITON_INT8]
GPUS = ["sm_80", "sm_89", "sm_90", "sm_100"]
MODELS = {"2b": (30, False), "5b": (48, True)}  # heads, and whether positions are rotary
# Model, linears, attention and GPU. The other model is wider and turns Q and K: no kernel more, another signature.
CASES = [
    *itertools.product(["5b"], RECIPES, ATTENTIONS, GPUS),
    ("2b", "16-bit", AttentionBackend.TRITON, "sm_90"),
    ("2b", "int8", AttentionBackend.TRITON_INT8, "sm_90"),
]
HEAD_DIM, TEXT, TOKENS, DTYPE = 64, 226, 300, torch.bfloat16  # more tokens change no kernel


def empty(*shape, dtype=DTYPE):
    return torch.empty(shape, dtype=dtype, device="cuda")


def weight(out_features, in_features, quantized):
    """Weight and bias, or 8-bit numbers, scales and bias."""
    numbers, bias = empty(out_features, in_features, dtype=quantized or DTYPE), empty(out_features)
    return (numbers, bias) if quantized is None else (numbers, empty(out_features, dtype=torch.float32), bias)


def block_and_inputs(heads, rotary, backend, quantized):
    """The arguments of `from_norm_to_norm`, fake, with the forms of linears that a plan for a GPU binds."""
    dim = heads * HEAD_DIM
    with torch.device("meta"):
        reference = CogVideoXBlock(dim=dim, num_attention_heads=heads, attention_head_dim=HEAD_DIM, time_embed_dim=512)
        block = FastCogVideoXBlock.adopt(reference).eval()
    for owner in block.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, nn.Parameter(empty(*parameter.shape), requires_grad=False))
    shapes = (3 * dim, dim), (dim, dim), (4 * dim, dim), (dim, 4 * dim)
    qkv, out, first, second = (weight(*shape, quantized) for shape in shapes)
    normed = empty(2, TOKENS, dim, dtype=quantized or DTYPE)
    if quantized is None:
        ff = FeedForwardPair(CublasLtLinear(*first), MergedLinear(*second))
        forms = {"qkv": MergedLinear(*qkv), "ff": ff}
    else:
        scaled = [ScaledLinear(*parts, DTYPE) for parts in (qkv, out, first, second)]
        forms = {"qkv": scaled[0], "out": scaled[1], "ff": ScaledFeedForward(*scaled[2:])}
        normed = QuantizedRows(normed, empty(2, TOKENS, dtype=torch.float32))
    how = {"called": False, "fused": True, "attends": True, "operations": "triton"}
    how |= {"attention": AttentionPlan(backend), "guard": empty(1, dtype=torch.int32)}
    norms = tuple(NormModulation(*(empty(1, 2, dim) for _ in range(3))) for _ in range(2))
    angles = tuple(empty(TOKENS - TEXT, HEAD_DIM, dtype=torch.float32) for _ in range(2)) if rotary else None
    return block, empty(2, TOKENS, dim), normed, norms, angles, BoundBlock(**how, **forms)


def from_norm_to_norm(block, stream, normed, norms, angles, bound):
    """`FastCogVideoXBlock.branches`, which `compile="blocks"` compiles, and the next block's norm as `run_blocks` has
    it."""
    stream, branch = block.branches(stream, normed, norms, TEXT, angles, None, bound)
    following = block.norm1, norms[0]
    return residual_norm(stream, branch, norms[1].gate, *following, TEXT, bound.operations, bound.norm1_dtype)


@functools.cache
def named_kernels(heads, rotary, attention, quantized):
    return block_kernels(heads, HEAD_DIM, DTYPE, rotary, backend=attention, quantized=quantized)


def check(kernel, target):
    """No argument in double, and machine code for `target` that fits it without spills."""
    wide = [name for name, of in kernel.signature.items() if "fp64" in of]
    assert not wide, f"{kernel.name}: {', '.join(wide)} in double"
    problems = machine_code.read(kernel.compile(), target).problems(target)
    assert not problems, f"{kernel.name} on {target.name}: {problems}"


@pytest.mark.parametrize(("model", "recipe", "attention", "gpu"), CASES, ids=str)
def test_code_of_a_block(model, recipe, attention, gpu):
    target, quantized, (heads, rotary) = TARGETS[gpu], RECIPES[recipe], MODELS[model]
    if quantized is torch.float8_e4m3fn and not target.e4m3:
        pytest.skip(f"{gpu} does not multiply float8_e4m3fn")
    with pretend(target):
        expected = named_kernels(heads, rotary, attention, quantized)
        with FakeTensorMode():
            code = code_of(from_norm_to_norm, *block_and_inputs(heads, rotary, attention, quantized))
        assert code.launched == expected
        assert len(expected) == (8 if quantized is None else 9)
        assert all(kernel.by_user for kernel in code.kernels), [kernel.name for kernel in code.kernels]
        assert {kernel.name for kernel in code.kernels} <= set(expected)
        for kernel in code.kernels:
            check(kernel, target)


@triton.jit
def scale_kernel(x_ptr, output_ptr, factor, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(output_ptr + columns, tl.load(x_ptr + columns) * factor)


def test_a_number_that_is_no_constant_is_found():
    """What `check` is for: eager Triton would take this factor in fp32."""

    def scale(x):
        output = torch.empty_like(x)
        torch.library.wrap_triton(scale_kernel)[(1,)](x, output, 0.1, BLOCK=128)
        return output

    with pretend(TARGETS["sm_90"]), FakeTensorMode():
        (kernel,) = code_of(scale, empty(128, dtype=torch.float32)).kernels
        assert kernel.by_user and kernel.signature["x_ptr"] == "*fp32"
        with pytest.raises(AssertionError, match="factor in double"):
            check(kernel, TARGETS["sm_90"])


def test_a_kernel_of_inductors_own_is_found():
    with pretend(TARGETS["sm_90"]), FakeTensorMode():
        code = code_of(lambda x: x.sin() + 1, empty(128))
    (kernel,) = code.kernels
    assert not kernel.by_user and code.launched == [kernel.name]
