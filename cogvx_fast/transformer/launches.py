"""What a block launches on a GPU: its graph, traced over fake CUDA tensors without one."""

from __future__ import annotations

import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch._subclasses.fake_tensor import FakeTensorMode

from ..attention import CAPABILITIES, AttentionBackend
from .block import FastCogVideoXBlock
from .modulation import NormModulation
from .plan import BlockPlan, FusedFeedForward, GeluLinear, MergedLinear

TEXT, TOKENS = 226, 300  # any numbers: a kernel more or less does not depend on them
MOST_KERNELS = 9  # that a block may launch, products of matrices and attention included


def block_kernels(
    heads: int,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float16,
    rotary: bool = True,
    fuse_gelu: bool = True,
    backend: AttentionBackend = AttentionBackend.TRITON,
) -> list[str]:
    """The kernels that a block launches, in order: Triton's by their names, others as aten calls them.

    Raises:
        ImportError: without triton.
    """
    from cogvx_kernels import aot

    dim = heads * head_dim
    with torch.device("meta"):
        reference = CogVideoXBlock(dim=dim, num_attention_heads=heads, attention_head_dim=head_dim, time_embed_dim=512)
        block = FastCogVideoXBlock(reference)
    block.attn1.processor.backend = CAPABILITIES[backend]
    with FakeTensorMode(), torch.device("cuda"):
        parameters = {name: torch.empty(p.shape, dtype=dtype) for name, p in block.named_parameters()}
        stream = torch.empty(2, TOKENS, dim, dtype=dtype)
        table = [torch.empty(1, 2, dim, dtype=dtype) for _ in range(6)]
        qkv = [torch.empty(3 * dim, dim, dtype=dtype), torch.empty(3 * dim, dtype=dtype)]
        angles = [torch.empty(TOKENS - TEXT, head_dim) for _ in range(2)] if rotary else []

    def run(
        parameters: dict[str, torch.Tensor],
        stream: torch.Tensor,
        table: list[torch.Tensor],
        qkv: list[torch.Tensor],
        angles: list[torch.Tensor],
    ) -> torch.Tensor:
        vectors = NormModulation(*table[:3]), NormModulation(*table[3:])
        names = ("ff.net.0.proj.weight", "ff.net.0.proj.bias"), ("ff.net.2.weight", "ff.net.2.bias")
        first, second = ([parameters[name] for name in pair] for pair in names)
        ff = FusedFeedForward(GeluLinear(*first), MergedLinear(*second)) if fuse_gelu else None
        plan = BlockPlan(impl="triton", qkv=MergedLinear(*qkv), ff=ff)
        arguments = (stream, vectors, TEXT, tuple(angles) or None, None, plan)
        return torch.func.functional_call(block, parameters, arguments)

    return aot.kernel_names(aot.trace(run, parameters, stream, table, qkv, angles))
