"""What a block launches on a GPU: its graph, traced over fake CUDA tensors without one."""

from __future__ import annotations

import dataclasses

import torch
from cogvx_kernels import ops
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..config import AttentionBackend
from ..plan import AttentionPlan
from .attention import Rotary
from .binding import BoundBlock
from .block import FastCogVideoXBlock, Norms, residual_norm
from .linear import CublasLtLinear, FeedForwardPair, MergedLinear, QuantizedRows, ScaledFeedForward, ScaledLinear
from .modulation import NormModulation

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
        block = FastCogVideoXBlock.adopt(reference)
    with FakeTensorMode():
        parameters = {name: _empty(*p.shape, dtype=dtype) for name, p in block.named_parameters()}
        stream = _empty(2, TOKENS, dim, dtype=dtype)
        table = [_empty(1, 2, dim, dtype=dtype) for _ in range(6)]
        angles = [_empty(TOKENS - TEXT, head_dim) for _ in range(2)] if rotary else []
        shapes = (3 * dim, dim), (dim, dim), (4 * dim, dim), (dim, 4 * dim)
        weights = [_weight(*shape, dtype, quantized) for shape in shapes]
        numbers = _empty(2, TOKENS, dim, dtype=quantized or dtype)
        normed = numbers if quantized is None else QuantizedRows(numbers, _empty(2, TOKENS))

    def run(
        parameters: dict[str, torch.Tensor],
        stream: torch.Tensor,
        normed: torch.Tensor | QuantizedRows,
        table: list[torch.Tensor],
        weights: list[tuple[torch.Tensor, ...]],
        angles: list[torch.Tensor],
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | QuantizedRows]:
        norms = NormModulation(*table[:3]), NormModulation(*table[3:])
        bound = BoundBlock(
            called=False, fused=True, attends=True, operations="triton", attention=AttentionPlan(backend)
        )
        if quantized is None:
            qkv, _, first, second = weights
            ff = FeedForwardPair(CublasLtLinear(*first), MergedLinear(*second)) if fuse_gelu else None
            bound = dataclasses.replace(bound, qkv=MergedLinear(*qkv), ff=ff)
        else:
            scaled = [ScaledLinear(numbers, scales, bias, dtype) for numbers, scales, bias in weights]
            feed_forward = ScaledFeedForward(scaled[2], scaled[3])
            bound = dataclasses.replace(bound, qkv=scaled[0], out=scaled[1], ff=feed_forward)
        arguments = (stream, normed, norms, tuple(angles) or None, bound, last)
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
        norms: Norms,
        angles: Rotary | None,
        bound: BoundBlock,
        last: bool,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | QuantizedRows]:
        stream, branch = self.block.branches(stream, normed, norms, TEXT, angles, None, bound)
        gate = norms[1].gate
        if last:
            return ops.gated_residual(stream, branch, gate, TEXT, bound.operations)
        following = self.block.norm1, norms[0]
        return residual_norm(stream, branch, gate, *following, TEXT, bound.operations, bound.norm1_dtype)


def _weight(out_features: int, in_features: int, dtype: torch.dtype, quantized: torch.dtype | None) -> tuple:
    """Weight and bias, or 8-bit numbers, scales and bias."""
    weight, bias = _empty(out_features, in_features, dtype=quantized or dtype), _empty(out_features, dtype=dtype)
    return (weight, bias) if quantized is None else (weight, _empty(out_features), bias)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")
