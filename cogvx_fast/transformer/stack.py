"""The stack of blocks: one pass of the joint stream through all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cogvx_kernels import ops
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

from .attention import Rotary
from .binding import BoundBlock
from .block import FastCogVideoXBlock, Norms, residual_norm


@dataclass(frozen=True)
class StepInputs:
    """What all blocks of a step are given beside the stream.

    Attributes:
        text_seq_length: leading rows of the stream that are text.
        temb: the step's time embedding `(batch, time_embed_dim)`, for blocks that are called as diffusers does; None
            where none is.
        image_rotary_emb: cosines and sines for the video rows, or None.
    """

    text_seq_length: int
    temb: torch.Tensor | None
    image_rotary_emb: Rotary | None
    attention_kwargs: dict[str, Any] | None


def run_blocks(
    stream: torch.Tensor,
    blocks: Iterable[CogVideoXBlock],
    norms: Sequence[Norms],
    bound: Sequence[BoundBlock],
    step: StepInputs,
    compiles: bool = False,
) -> torch.Tensor:
    """The stream `(batch, sequence, dim)` after all `blocks`.

    Args:
        norms: of each block the vectors of its two norms for this step; of those that are called they are not looked
            at.
        bound: how each runs.
        compiles: whether a block that is neither called nor eager runs compiled.
    """
    eager: tuple[Callable[..., Any], ...] = FastCogVideoXBlock.whole, FastCogVideoXBlock.branches
    # One function for all blocks: dynamo compiles it once and takes their weights as inputs.
    compiled = tuple(torch.compile(function, fullgraph=True) for function in eager) if compiles else eager
    length = step.text_seq_length
    shared = (length, step.image_rotary_emb, step.attention_kwargs)
    operations = "torch"
    branch: torch.Tensor | None = None  # what the block before has left to add
    gate: Any = None  # of the branch: a tensor where there is one
    for block, vectors, how in zip(blocks, norms, bound, strict=True):
        if not how.chains and branch is not None:
            stream, branch = ops.gated_residual(stream, branch, gate, length, operations), None
        whole, branches = eager if how.eager else compiled
        if how.called:
            stream = _called(block, stream, step)
        elif not how.chains:
            stream = whole(block, stream, vectors, *shared, how)
        else:
            operations = how.operations
            stream, normed = residual_norm(
                stream, branch, gate, block.norm1, vectors[0], length, operations, how.norm1_dtype
            )
            del branch  # a stream that would lie beside all of the block
            stream, branch = branches(block, stream, normed, vectors, *shared, how)
            gate = vectors[1].gate
            del normed
    return stream if branch is None else ops.gated_residual(stream, branch, gate, length, operations)


def _called(
    block: Callable[..., tuple[torch.Tensor, torch.Tensor]], stream: torch.Tensor, step: StepInputs
) -> torch.Tensor:
    """A block called the way diffusers' loop does, with video and text apart."""
    video, text = block(
        hidden_states=stream[:, step.text_seq_length :],
        encoder_hidden_states=stream[:, : step.text_seq_length],
        temb=step.temb,
        image_rotary_emb=step.image_rotary_emb,
        attention_kwargs=step.attention_kwargs,
    )
    return torch.cat([text, video], dim=1)
