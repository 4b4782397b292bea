"""What hangs on modules: caching, casting, offloading and other people's patches do their work when one is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.modules.module as torch_module
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook
from torch import nn

from . import devices

# What diffusers' and accelerate's hooks leave in a module's attributes; they belong to the very object.
_OF_HOOKS = ("forward", "_old_forward", "_hf_hook", "_diffusers_hook", "_compiled_call_impl")


def is_hooked(module: nn.Module) -> bool:
    """Whether calling `module` is more than its class's own forward: a hook, a patch or a compiled form of it."""
    attributes = vars(module)
    patched = "forward" in attributes and not (aligns_devices(module) or _is_own(module, attributes["forward"]))
    compiled = attributes.get("_compiled_call_impl") is not None
    return patched or compiled or bool(module._forward_hooks) or bool(module._forward_pre_hooks)


def own_forward(module: nn.Module) -> bool:
    """Whether somebody has put a forward into this one object, which is none of a hook's."""
    forward = vars(module).get("forward")
    hooked = "_hf_hook" in vars(module) or bool(hooks_of_diffusers(module))
    return forward is not None and not hooked and not _is_own(module, forward)


def hooks_of_diffusers(module: nn.Module) -> list[str]:
    """The names of diffusers' own hooks on `module`: of caching, casting, offloading."""
    registry = vars(module).get("_diffusers_hook")
    return [] if registry is None else list(registry.hooks)


def has_global_hooks() -> bool:
    """Whether somebody wants to see every call of every module: `register_module_forward_hook` and the like."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def _is_own(module: nn.Module, forward: Callable) -> bool:
    """Whether `forward` is that of the module's class, as a hook that was taken off leaves it behind."""
    return getattr(forward, "__func__", None) is type(module).forward


def aligns_devices(module: nn.Module, device: torch.device | None = None) -> bool:
    """Whether a device map has hooked `module`, which then takes inputs to its device; its weights stay there.

    Args:
        device: where the hook must move nothing at all; None: anywhere.
    """
    hook: ModelHook | None = vars(module).get("_hf_hook")
    return hook is not None and _only_aligns(hook, device)


def _only_aligns(hook: ModelHook, device: torch.device | None) -> bool:
    if isinstance(hook, SequentialHook):
        return all(_only_aligns(each, device) for each in hook.hooks)
    if type(hook) is not AlignDevicesHook or hook.offload:
        return False
    return device is None or hook.execution_device is None or devices.indexed(hook.execution_device) == device


def moves_weights(module: nn.Module) -> bool:
    """Whether the weights are elsewhere until the module is called: offloading, by module or by group."""
    by_group = "group_offloading" in hooks_of_diffusers(module)
    return by_group or (vars(module).get("_hf_hook") is not None and not aligns_devices(module))


def without_hooks(module: nn.Module) -> dict[str, Any]:
    """The attributes of `module` for another object of the same children, without what hooks left in them.

    Hooks that torch itself keeps (`register_forward_hook` and the like) stay, and are the same for both objects.
    """
    return {name: value for name, value in vars(module).items() if name not in _OF_HOOKS}


def is_patched(cls: type, method: str) -> bool:
    """Whether somebody has put another function in the place of a library's method: its module is not the class's."""
    return inspect.unwrap(getattr(cls, method)).__module__ != cls.__module__


def recompiled(compiled: Callable, function: Callable) -> Callable:
    """`function` compiled with the options that `compiled` was."""
    context = inspect.getclosurevars(compiled).nonlocals.get("self")
    return context(function) if callable(context) else torch.compile(function)


Model = TypeVar("Model", bound=nn.Module | None)


def unwrapped(model: Model) -> Model:
    """The model that a `torch.compile` of it wraps, or itself."""
    return getattr(model, "_orig_mod", model)


def rewrapped(old: nn.Module, new: nn.Module) -> nn.Module:
    """`new`, compiled with the options that `old` is compiled with, if it is."""
    return type(old)(new, old.dynamo_ctx) if hasattr(old, "_orig_mod") else new


class StandsFor(type):
    """The kind of our models' classes: they compare equal to the diffusers class whose place they take.

    `DiffusionPipeline.from_pipe` hands a model over only if its class is, by `==`, what the new pipeline's signature
    names; so a model of ours can go on in diffusers' pipelines.
    """

    def __eq__(cls, other: object) -> bool:
        return cls is other or vars(cls).get("_stands_for", cls) is other

    def __hash__(cls) -> int:
        return type.__hash__(cls)
