"""What a block launches on a GPU: its graph, traced over fake CUDA tensors without one."""

from __future__ import annotations

import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..attention import CAPABILITIES, AttentionBackend
from .block import FastCogVideoXBlock
from .modulation import NormModulation
from .plan import BlockPlan, FusedFeedForward, GeluLinear, MergedLinear
from .scaled import QuantizedRows, ScaledFeedForward, ScaledLinear

TEXT, TOKENS = 226, 300  # any numbers: a kernel more or less does not depend on them
MOST_KERNELS = 9  # that a block may launch, products of matrices and attention included


def block_kernels(
    heads: int,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float16,
    rotary: bool = True,
    fuse_gelu: bool = True,
    backend: AttentionBackend = AttentionBackend.TRITON,
    quantized: torch.dtype | None = None,
    last: bool = False,
) -> list[str]:
    """The kernels that a block launches, in order: Triton's by their names, others as aten calls them.

    Its own first norm is not among them, as the block before computes it, but that of the block after, unless it is the
    `last`.

    Args:
        quantized: of W8A8 linears, `torch.int8` or `torch.float8_e4m3fn`.

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
        angles = [torch.empty(TOKENS - TEXT, head_dim) for _ in range(2)] if rotary else []
        shapes = (3 * dim, dim), (dim, dim), (4 * dim, dim), (dim, 4 * dim)
        weights = [_weight(*shape, dtype, quantized) for shape in shapes]
        normed = torch.empty(2, TOKENS, dim, dtype=quantized or dtype)
        normed = normed if quantized is None else QuantizedRows(normed, torch.empty(2, TOKENS))

    def run(
        parameters: dict[str, torch.Tensor],
        stream: torch.Tensor,
        normed: torch.Tensor | QuantizedRows,
        table: list[torch.Tensor],
        weights: list[tuple[torch.Tensor, ...]],
        angles: list[torch.Tensor],
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        vectors = NormModulation(*table[:3]), NormModulation(*table[3:])
        if quantized is None:
            qkv, _, first, second = weights
            ff = FusedFeedForward(GeluLinear(*first), MergedLinear(*second)) if fuse_gelu else None
            plan = BlockPlan(impl="triton", qkv=MergedLinear(*qkv), ff=ff)
        else:
            qkv, out, first, second = (ScaledLinear(*weight, dtype) for weight in weights)
            plan = BlockPlan(impl="triton", qkv=qkv, out=out, ff=ScaledFeedForward(first, second))
        arguments = (stream, normed, vectors, tuple(angles) or None, plan, last)
        return torch.func.functional_call(_Between(block), {f"block.{n}": p for n, p in parameters.items()}, arguments)

    return aot.kernel_names(aot.trace(run, parameters, stream, normed, table, weights, angles))


class _Between(nn.Module):
    """A block from the norm that the one before leaves to the norm of the one after, which is like it."""

    def __init__(self, block: FastCogVideoXBlock):
        super().__init__()
        self.block = block

    def forward(
        self,
        stream: torch.Tensor,
        normed: torch.Tensor | QuantizedRows,
        vectors: tuple[NormModulation, NormModulation],
        angles: tuple[torch.Tensor, torch.Tensor] | None,
        plan: BlockPlan,
        last: bool,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        stream, forwarded = self.block.run_branches(stream, normed, vectors, TEXT, angles, None, plan)
        if last:
            return self.block.leave(stream, forwarded, vectors[1], TEXT, plan)
        return self.block.enter_after(stream, forwarded, vectors[1].gate, vectors[0], TEXT, plan)


def _weight(out_features: int, in_features: int, dtype: torch.dtype, quantized: torch.dtype | None) -> tuple:
    """Weight and bias, or 8-bit numbers, scales and bias."""
    weight, bias = (
        torch.empty(out_features, in_features, dtype=quantized or dtype),
        torch.empty(out_features, dtype=dtype),
    )
    return (weight, bias) if quantized is None else (weight, torch.empty(out_features), bias)
