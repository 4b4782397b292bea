"""From diffusers' transformer to ours: what comes along, what is shared, and what cannot be kept."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any, TypeVar

import torch
from accelerate.hooks import add_hook_to_module
from diffusers import CogVideoXTransformer3DModel
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import nn

from ..hooks import (
    aligns_devices,
    hooks_of_diffusers,
    is_patched,
    moves_weights,
    own_forward,
    recompiled,
    without_hooks,
)
from .block import FastCogVideoXBlock

# Hooks of diffusers that are about weights and not about what a module gives: they stay on the modules we share.
_OF_WEIGHTS = ("layerwise_casting", "peft_autocast_disable")
Model = TypeVar("Model", bound=CogVideoXTransformer3DModel)


def why_not_adopted(reference: nn.Module) -> str:
    """What of a transformer our forward pass would lose, in words; empty where nothing."""
    if not isinstance(reference, CogVideoXTransformer3DModel):
        return f"it is a {type(reference).__name__}, not a {CogVideoXTransformer3DModel.__name__}"
    if type(reference).forward is not CogVideoXTransformer3DModel.forward:
        return f"{type(reference).__name__} has a forward of its own, which runs as it is"
    if is_patched(CogVideoXTransformer3DModel, "forward"):
        return "CogVideoXTransformer3DModel.forward was replaced, and runs as it is"
    if own_forward(reference):
        return "its forward was replaced, and runs as it is"
    devices = {parameter.device for parameter in reference.parameters()} - {torch.device("meta")}
    if len(devices) > 1 and not any(map(moves_weights, reference.modules())):
        return f"a device map has spread it over {', '.join(sorted(map(str, devices)))}, and it runs as it is"
    return ""


def adopted(cls: type[Model], reference: CogVideoXTransformer3DModel) -> Model:
    """A `cls` on the modules of `reference`; see `FastCogVideoXTransformer3DModel.adopt`."""
    reason = why_not_adopted(reference)
    if reason:
        raise ValueError(f"this transformer cannot be made fast: {reason}")
    _check_hooks(reference)
    model = object.__new__(cls)
    model.__dict__ = without_hooks(reference)
    model.__dict__.pop("peft_config", None)
    model.__dict__.pop("_hf_peft_config_loaded", None)
    model.__dict__.update(_adopted_from=reference, _cache_config=None)
    model.__dict__["_own_adapters"] = set(getattr(reference, "peft_config", None) or {})
    blocks = nn.ModuleList(map(_adopted_block, reference.transformer_blocks))
    blocks.train(reference.training)
    # A child that a cache hooks is a copy, for a cache of our own.
    children = {name: _unhooked(child) for name, child in reference._modules.items()}
    model._modules = {**children, "transformer_blocks": blocks}
    model.__dict__["_seen"] = dict(reference._modules)
    if aligns_devices(reference):
        add_hook_to_module(model, copy.copy(reference._hf_hook))
    if reference._compiled_call_impl is not None:
        model._compiled_call_impl = recompiled(reference._compiled_call_impl, model._call_impl)
    if reference.is_cache_enabled:
        model.enable_cache(reference._cache_config)
    return model


def _adopted_block(block: nn.Module) -> nn.Module:
    """Our block on the modules of diffusers'; one with a forward of its own stays, and is called."""
    if type(block).forward is not CogVideoXBlock.forward or own_forward(block):
        return block
    return FastCogVideoXBlock.adopt(block)


def _check_hooks(reference: CogVideoXTransformer3DModel) -> None:
    """Raise a ValueError for hooks that belong to calls of the very objects that ours replace."""
    if any(map(moves_weights, reference.modules())):
        raise ValueError(
            "the transformer has offloading hooks already; make the pipeline fast first and then call"
            " enable_model_cpu_offload(), enable_sequential_cpu_offload() or enable_group_offload()"
        )
    replaced = {id(reference), *map(id, reference._modules.values()), *map(id, reference.transformer_blocks)}
    replaced |= {id(block.attn1) for block in reference.transformer_blocks if hasattr(block, "attn1")}
    for name, module in reference.named_modules():
        caching = [hook for hook in hooks_of_diffusers(module) if not hook.startswith(_OF_WEIGHTS)]
        # What `enable_cache` put on objects that we replace, it puts on ours.
        if caching and not (reference.is_cache_enabled and id(module) in replaced):
            raise ValueError(
                f"a cache or another of diffusers' hooks ({', '.join(caching)}) hangs on {name or 'the transformer'!r}"
                " already; make the pipeline fast first and then enable it there"
            )


def _unhooked(child: nn.Module | None) -> nn.Module | None:
    if child is None or not hasattr(child, "_diffusers_hook"):
        return child
    twin = copy.copy(child)
    twin.__dict__ = without_hooks(child)
    return twin


class SharedAttribute:
    """An attribute that lies on the model that ours was adopted from, so that both have the same."""

    def __init__(self, *default: Any) -> None:
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, model: nn.Module | None, owner: type) -> Any:
        if model is None:
            return self
        reference = model.__dict__.get("_adopted_from")
        if reference is not None:
            return getattr(reference, self.name)
        if self.name in model.__dict__:
            return model.__dict__[self.name]
        if not self.default:
            raise AttributeError(self.name)
        return self.default[0]

    def __set__(self, model: nn.Module, value: Any) -> None:
        reference = model.__dict__.get("_adopted_from")
        if reference is not None:
            setattr(reference, self.name, value)
        else:
            model.__dict__[self.name] = value

    def __delete__(self, model: nn.Module) -> None:
        reference = model.__dict__.get("_adopted_from")
        if reference is not None:
            delattr(reference, self.name)
        elif self.name in model.__dict__:
            del model.__dict__[self.name]
        else:
            raise AttributeError(self.name)


class SharedAdapters(PeftAdapterMixin):
    """A transformer's adapters, of which the model that it was adopted from knows, and the other way round.

    peft puts them beside linears that both models have. Those beside direct children of the model are handed over.
    """

    peft_config = SharedAttribute()
    _hf_peft_config_loaded = SharedAttribute(False)

    def stand_alone(self) -> None:
        """Share no adapters from here on: for a copy of a model, whose linears are its own."""
        shared = {
            name: getattr(self, name) for name in ("peft_config", "_hf_peft_config_loaded") if hasattr(self, name)
        }
        self.__dict__.pop("_adopted_from", None)
        for name, value in shared.items():
            setattr(self, name, dict(value) if isinstance(value, dict) else value)

    def take_over(self) -> None:
        """Children that were replaced in the model that this one was adopted from, as peft does, come along."""
        reference = self.__dict__.get("_adopted_from")
        if reference is None:
            return
        for name, child in reference._modules.items():
            if name != "transformer_blocks" and child is not self._seen.get(name):
                self._modules[name] = self._seen[name] = child

    def _hand_over(self) -> None:
        reference = self.__dict__.get("_adopted_from")
        if reference is None:
            return
        for name, child in self._modules.items():
            if name != "transformer_blocks" and child is not self._seen.get(name) and name in reference._modules:
                reference._modules[name] = self._seen[name] = child

    def _note_own(self, before: set[str]) -> None:
        own = self.__dict__.setdefault("_own_adapters", set())
        own |= set(getattr(self, "peft_config", None) or {}) - before
        self._hand_over()

    @functools.wraps(PeftAdapterMixin.load_lora_adapter)
    def load_lora_adapter(self, *args: Any, **kwargs: Any) -> None:
        before = set(getattr(self, "peft_config", None) or {})
        super().load_lora_adapter(*args, **kwargs)
        self._note_own(before)

    @functools.wraps(PeftAdapterMixin.add_adapter)
    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        before = set(getattr(self, "peft_config", None) or {})
        super().add_adapter(*args, **kwargs)
        self._note_own(before)

    def unload_lora(self) -> None:
        """As in diffusers; adapters that came by another pipeline of the same weights stay there."""
        own = self.__dict__.get("_own_adapters", set())
        others = set(getattr(self, "peft_config", None) or {}) - own
        if not others:
            super().unload_lora()
        elif own:
            self.delete_adapters(sorted(own))
        if others:
            warnings.warn(
                f"adapters {', '.join(sorted(others))} were loaded by another pipeline that shares these weights, and"
                " stay: unload them there, or delete_adapters() here",
                stacklevel=3,
            )
        own.clear()
        self._hand_over()
