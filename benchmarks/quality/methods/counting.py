"""What a generation took: calls of the whole network, or the work of its blocks where a cache leaves out parts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from .method import forward_replaced


class Calls:
    """How often the network was called."""

    def __init__(self) -> None:
        self.evaluations = 0.0


@contextlib.contextmanager
def whole_calls(pipe: Any) -> Iterator[Calls]:
    """Counts calls of the transformer's forward, below whatever a method puts in its place."""
    calls, inner = Calls(), pipe.transformer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.evaluations += 1
        return inner(*args, **kwargs)

    with forward_replaced(pipe.transformer, forward):
        yield calls


def attention_work(tokens: int, dim: int, inner: int) -> int:
    """Multiplications of one block's attention for one sample: four projections, the scores, and their product."""
    return 4 * tokens * dim * inner + 2 * tokens * tokens * inner


def feed_forward_work(tokens: int, dim: int, inner: int) -> int:
    """Multiplications of one block's feed-forward for one sample."""
    return 2 * tokens * dim * inner


class Work:
    """Multiplications of attentions and feed-forwards; what is computed around them, norms and the like, is left out.

    One whole evaluation is all blocks for the largest batch that came: every method computes a whole step first.
    """

    def __init__(self) -> None:
        self.done = 0
        self._whole: dict[str, int] = {}

    def add(self, part: str, batch: int, work: int) -> None:
        self.done += batch * work
        self._whole[part] = max(self._whole.get(part, 0), batch * work)

    @property
    def evaluations(self) -> float:
        return self.done / sum(self._whole.values()) if self._whole else 0.0


@contextlib.contextmanager
def block_work(pipe: Any) -> Iterator[Work]:
    """Counts what of the blocks is computed, by hooks on linears that nothing but computing calls."""
    work, hooks = Work(), contextlib.ExitStack()

    def watch(part: str, linear: torch.nn.Linear, cost: Any) -> None:
        def add(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            batch, tokens, dim = args[0].shape
            work.add(part, batch, cost(tokens, dim, linear.out_features))

        hooks.callback(linear.register_forward_pre_hook(add).remove)

    with hooks:
        for number, block in enumerate(pipe.transformer.transformer_blocks):
            watch(f"attention {number}", block.attn1.to_q, attention_work)
            watch(f"feed-forward {number}", block.ff.net[0].proj, feed_forward_work)
        yield work
