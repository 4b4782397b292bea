"""The roofline of a step: its matrix products and its attention on bare tensors, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import nn

from .stages import shapes
from .workloads import Workload


def block_linears(block: nn.Module) -> list[nn.Linear]:
    """The linears of one block that run over all tokens, in order; AdaLN's see a few vectors only."""
    attention, feed_forward = block.attn1, block.ff.net
    return [attention.to_q, attention.to_k, attention.to_v, attention.to_out[0], feed_forward[0].proj, feed_forward[2]]


def flop(workload: Workload, pipe: CogVideoXPipeline) -> dict[str, int]:
    """Floating-point operations of one step in the linears and in attention, a multiplication and an addition each."""
    size, transformer = shapes(workload, pipe), pipe.transformer
    rows = size["batch"] * size["tokens"]
    per_row = sum(
        linear.in_features * linear.out_features
        for block in transformer.transformer_blocks
        for linear in block_linears(block)
    )
    out = transformer.proj_out
    linears = 2 * rows * per_row + 2 * size["batch"] * size["video_tokens"] * out.in_features * out.out_features
    attention = 4 * rows * size["tokens"] * size["heads"] * size["head_dim"] * size["layers"]
    return {"linear_flop": linears, "attention_flop": attention}


def arithmetic_call(
    pipe: CogVideoXPipeline, workload: Workload, linears: bool = True, packed: bool = False
) -> Callable[[int], None]:
    """A call that runs the linears and the attention of all blocks, then `proj_out`, on random tensors.

    Each block multiplies with its own weights, so that they come from memory as they do in a step. The patch
    embedding, whose products are less than a thousandth of the step's, is left out.

    Args:
        linears: False leaves attention alone.
        packed: reorders copies of the weights for oneDNN first, as inductor does when it freezes. For CPUs.
    """
    transformer: CogVideoXTransformer3DModel = pipe.transformer
    size, dtype, device = shapes(workload, pipe), transformer.dtype, pipe._execution_device
    rows, dim = size["batch"] * size["tokens"], size["heads"] * size["head_dim"]
    blocks = [block_linears(block) for block in transformer.transformer_blocks] if linears else []
    make = _packed if packed else lambda linear, rows: linear
    products = [[make(linear, rows) for linear in block] for block in blocks] or [[]] * size["layers"]
    project_out = make(transformer.proj_out, size["batch"] * size["video_tokens"]) if linears else None
    heads = (size["batch"], size["tokens"], size["heads"], size["head_dim"])
    query, key, value = (torch.randn(heads, device=device).to(dtype).transpose(1, 2) for _ in range(3))
    narrow = torch.randn(rows, dim, device=device).to(dtype)
    hidden = blocks[0][-1].in_features if blocks else dim
    wide = torch.randn(rows, hidden, device=device).to(dtype)
    video = narrow[: size["batch"] * size["video_tokens"]]

    def call(number: int) -> None:
        for block in products:
            for product in block[:3]:
                product(narrow)
            F.scaled_dot_product_attention(query, key, value)
            for product, x in zip(block[3:], (narrow, narrow, wide), strict=bool(block)):
                product(x)
        if project_out is not None:
            project_out(video)

    return call


def _packed(linear: nn.Linear, rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    # The one place that reads weights: plain linears of a model that was made for this measurement.
    mkldnn = torch.ops.mkldnn
    weight = mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
    return lambda x: mkldnn._linear_pointwise(x, weight, linear.bias, "none", [], "")
