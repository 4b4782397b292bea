"""What hangs on modules: caching, casting and offloading do their work when a module is called."""

from __future__ import annotations

from torch import nn


def is_hooked(module: nn.Module) -> bool:
    """Whether calling `module` is more than its own forward: accelerate's and diffusers' hooks replace that."""
    return "forward" in vars(module) or bool(module._forward_hooks) or bool(module._forward_pre_hooks)


def moves_weights(module: nn.Module) -> bool:
    """Whether the weights are elsewhere until the module is called: offloading, by module or by group."""
    registry = getattr(module, "_diffusers_hook", None)
    return hasattr(module, "_hf_hook") or (registry is not None and registry.get_hook("group_offloading") is not None)
