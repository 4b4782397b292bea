"""Another callback in the place of the one that a call of a pipeline brings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

CALLBACK, TENSORS = "callback_on_step_end", "callback_on_step_end_tensor_inputs"


def with_callback(
    call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], before: Any, callback: Callable[..., Any]
) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call with `callback` in the place of `before`, which gets the tensors that `before` asked for.

    Args:
        call: a pipeline's `__call__`, whose `self` is not among `args`.
    """
    changed: dict[str, Any] = {CALLBACK: callback}
    if isinstance(before, PipelineCallback | MultiPipelineCallbacks):  # upstream asks for its class
        changed[TENSORS] = before.tensor_inputs
    names = list(inspect.signature(call).parameters)[1:]
    by_position = zip(names, args, strict=False)
    given = tuple(changed.pop(name) if name in changed else value for name, value in by_position)
    return given + args[len(given) :], {**kwargs, **changed}
