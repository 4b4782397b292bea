"""The seam of TeaCache and MagCache: a skipped step adds the last residual of the whole stack of blocks.

Patch embedding, time embedding, final norms and projection are computed at every step, as both have it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from cogvx_fast.transformer.position import unpatchify

from .method import forward_replaced

Watch = Callable[[int, torch.Tensor], None]  # is given each computed step and its residual (batch, tokens, dim)


def time_embedding(transformer: Any, timestep: torch.Tensor, ofs: torch.Tensor | None = None) -> torch.Tensor:
    """The embedding `(batch, time_embed_dim)` of timesteps `(batch,)`, in the model's dtype, as diffusers has it."""
    embedding = transformer.time_embedding(transformer.time_proj(timestep).to(transformer.dtype))
    if transformer.ofs_embedding is not None:
        embedding = embedding + transformer.ofs_embedding(transformer.ofs_proj(ofs).to(transformer.dtype))
    return embedding


@contextlib.contextmanager
def residual_reused(transformer: Any, computed: set[int] | None, watch: Watch | None = None) -> Iterator[None]:
    """One generation in which only `computed` steps run the blocks; None: all do."""
    steps, inner, ends = itertools.count(), transformer.forward, []
    residual: list[torch.Tensor] = []

    def tail(stream: torch.Tensor, temb: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        tokens = transformer.proj_out(transformer.norm_out(transformer.norm_final(stream), temb=temb))
        return unpatchify(tokens, transformer.config.patch_size, transformer.config.patch_size_t, shape)

    def forward(
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        ofs: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor]:
        step = next(steps)
        begin = transformer.patch_embed(encoder_hidden_states, hidden_states)[:, encoder_hidden_states.shape[1] :]
        if computed is not None and step not in computed:
            temb = time_embedding(transformer, timestep, ofs)
            return (tail((begin.float() + residual[0]).to(begin.dtype), temb, hidden_states.shape),)
        given = {"timestep": timestep, "ofs": ofs, **kwargs}
        output = inner(hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, **given)
        residual[:] = [ends.pop().float() - begin.float()]
        if watch is not None:
            watch(step, residual[0])
        return output

    hook = transformer.norm_final.register_forward_pre_hook(lambda module, args: ends.append(args[0]))
    with contextlib.ExitStack() as stack:
        stack.callback(hook.remove)
        stack.enter_context(forward_replaced(transformer, forward))
        yield


def nearest_threshold(count: Callable[[float], int], wanted: int, highest: float) -> float:
    """The threshold in (0, highest] whose count is nearest to `wanted`, by bisection; counts fall with thresholds."""
    low, high = 0.0, highest
    best = highest
    for _ in range(60):
        middle = (low + high) / 2
        found = count(middle)
        if abs(found - wanted) < abs(count(best) - wanted):
            best = middle
        if found > wanted:
            low = middle
        else:
            high = middle
    return best
