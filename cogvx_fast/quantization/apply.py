"""Quantizes copies of a model's linears with torchao; whoever shares the original weights keeps them as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import nn

from .. import devices
from ..hooks import moves_weights
from .recipes import Recipe, Scheme

_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True)
class Extent:
    """What was quantized: how many linears, and the bytes of their weights before and after."""

    linears: int = 0
    bytes_before: int = 0
    bytes_after: int = 0

    def __add__(self, other: Extent) -> Extent:
        return Extent(
            self.linears + other.linears,
            self.bytes_before + other.bytes_before,
            self.bytes_after + other.bytes_after,
        )

    def __str__(self) -> str:
        return f"{self.linears} linears, {self.bytes_before / 1e6:.1f} MB to {self.bytes_after / 1e6:.1f} MB"


def quantize_modules(model: nn.Module, scheme_of: Callable[[str], Scheme | None]) -> Extent:
    """Quantize, in place, each linear of `model` for whose fully-qualified name `scheme_of` has a scheme.

    Raises:
        ValueError: if one is quantized already, its weights are elsewhere until it is called, or torchao left it as it
            was.
    """
    from torchao.quantization import quantize_

    extent = Extent()
    for name, linear in list(model.named_modules()):
        scheme = scheme_of(name) if isinstance(linear, nn.Linear) else None
        if scheme is None:
            continue
        if is_quantized(linear):
            raise ValueError(f"{name} is quantized already ({kind(linear)}); quantize the full-precision model")
        if moves_weights(linear) or linear.weight.device.type == "meta":
            raise ValueError(f"{name} is offloaded: quantize first, then enable offloading")
        before = linear.weight.numel() * linear.weight.element_size()
        linear.requires_grad_(False)
        with devices.current(linear.weight.device):  # torchao launches kernels of its own
            quantize_(linear, scheme.torchao_config(), filter_fn=lambda module, _: isinstance(module, nn.Linear))
        if not is_quantized(linear):
            raise ValueError(f"{name}: torchao cannot make {scheme} of a weight {tuple(linear.weight.shape)}")
        extent += Extent(1, before, storage_bytes(linear.weight))
    return extent


def quantize_transformer(transformer: nn.Module, recipe: Recipe) -> Extent:
    """`quantize_modules` of a transformer by a recipe's names."""
    return quantize_modules(transformer, recipe.scheme_of)


def quantize_text_encoder(text_encoder: nn.Module, scheme: Scheme) -> Extent:
    """`quantize_modules` of a T5 encoder: all of its linears."""
    import re

    from .recipes import T5

    return quantize_modules(text_encoder, lambda name: scheme if re.fullmatch(T5, name) else None)


def shared_copy(module: _Model) -> _Model:
    """A tree of new modules over the same parameters and buffers: replacing one in it leaves the original alone.

    Modules that occur twice do so in the copy. What is not a module is shared, dictionaries of it aside.
    """
    copies: dict[nn.Module, nn.Module] = {}

    def of(original: nn.Module) -> nn.Module:
        if original not in copies:
            new = copies[original] = copy.copy(original)
            new.__dict__ = {
                name: copy.copy(value) if isinstance(value, dict) else value for name, value in vars(original).items()
            }
            for name, child in original._modules.items():
                new._modules[name] = None if child is None else of(child)
        return copies[original]

    return cast(_Model, of(module))


def is_quantized(module: nn.Module) -> bool:
    """Whether the weight of `module` itself is one of torchao's."""
    from torchao.utils import TorchAOBaseTensor

    # Its own parameter: an adapter's `weight` is that of the linear in it.
    return isinstance(module._parameters.get("weight"), TorchAOBaseTensor)


def kind(module: nn.Module) -> str:
    return type(module.weight).__name__


def quantized_names(model: nn.Module) -> Iterator[str]:
    """The fully-qualified names of the modules of `model` that have a quantized weight."""
    return (name for name, module in model.named_modules() if is_quantized(module))


def storage_bytes(tensor: torch.Tensor) -> int:
    """The bytes of a tensor, of one of torchao's those of all tensors that it is made of."""
    parts = [tensor]
    if hasattr(tensor, "tensor_data_names"):
        names = [*tensor.tensor_data_names, *getattr(tensor, "optional_tensor_data_names", ())]
        parts = [part for name in names if (part := getattr(tensor, name)) is not None]
    return sum(part.numel() * part.element_size() for part in parts)
