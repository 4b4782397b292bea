"""What modules held when something was computed from them, so that it is computed anew when they change."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

SAMPLED = 64  # numbers of a weight that are looked at for changes that torch does not count


@dataclass(frozen=True)
class State:
    """Which tensors modules held and what was written to them, and the settings of adapters beside them.

    The tensors stay alive with it, so that an address cannot come to mean another one.
    """

    marks: tuple[Any, ...] = ()
    tensors: tuple[torch.Tensor, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def of(cls, *modules: nn.Module | None, numbers: bool = False) -> State:
        """
        Args:
            numbers: look at some numbers of tensors on a CPU, too: writing through `.data`, as merging adapters does,
                is not counted by torch. On a GPU that would wait for the device.
        """
        marks: list[Any] = []
        tensors: list[torch.Tensor] = []
        for module in modules:
            if module is None:
                continue
            if type(module) is nn.Linear:
                found: tuple[torch.Tensor | None, ...] = module.weight, module.bias
            else:
                found = (*module.parameters(), *module.buffers())
                marks.append(_adapters(module))
            marks.append(id(module))
            for tensor in found:
                if tensor is not None:
                    marks.append(_mark(tensor, numbers))
                    tensors.append(tensor)
        return cls(tuple(marks), tuple(tensors))

    @classmethod
    def of_tensors(cls, *tensors: torch.Tensor | None, numbers: bool = False) -> State:
        there = tuple(tensor for tensor in tensors if tensor is not None)
        return cls(tuple(_mark(tensor, numbers) for tensor in there), there)


def _mark(tensor: torch.Tensor, numbers: bool) -> tuple[Any, ...]:
    if hasattr(tensor, "qdata"):  # of torchao's
        return id(tensor), tensor.qdata.data_ptr(), _version(tensor.qdata)
    version = _version(tensor)
    address = tensor.data_ptr() if type(tensor) in (nn.Parameter, torch.Tensor) else 0
    if not (numbers or version is None) or tensor.device.type != "cpu" or not tensor.numel() or not address:
        return id(tensor), address, version
    flat = tensor.data.reshape(-1) if tensor.is_contiguous() else tensor.data.flatten()
    return id(tensor), address, version, flat[:: -(-flat.numel() // SAMPLED)].double().sum().item()


def _version(tensor: torch.Tensor) -> int | None:
    """How often the tensor was written to; None where torch does not count, as of inference tensors."""
    try:
        return tensor._version
    except RuntimeError:  # parameters of inference tensors say that they are none
        return None


def adapter_settings(model: nn.Module) -> tuple[Any, ...]:
    """What peft's layers in a model are set to; empty at once for one that has none."""
    return _adapters(model) if getattr(model, "peft_config", None) else ()


def _adapters(module: nn.Module) -> tuple[Any, ...]:
    """What peft's layers in `module` are set to: which adapters count, and how much."""
    layers: Iterable[Any] = module.modules()
    return tuple(
        (
            tuple(layer.active_adapters),
            layer.disable_adapters,
            tuple(layer.merged_adapters),
            tuple(sorted(layer.scaling.items())),
        )
        for layer in layers
        if hasattr(layer, "active_adapters") and hasattr(layer, "scaling")
    )


def fingerprint(module: nn.Module) -> tuple[Any, ...]:
    """What changes when the weights of `module` do, and not when they are moved, as by offloading.

    Some numbers of each are looked at: on a GPU that waits for the device. Of weights that are nowhere (meta) there is
    the shape alone.
    """
    marks: list[Any] = []
    samples: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        marks.append((tuple(tensor.shape), tensor.dtype, _version(tensor)))
        if tensor.numel() and tensor.device.type != "meta":
            flat = tensor.detach().reshape(-1)
            samples.setdefault(tensor.device, []).append(flat[:: -(-flat.numel() // SAMPLED)].float())
    numbers = [torch.cat(those).cpu().numpy().tobytes() for those in samples.values()]
    return tuple(marks), b"".join(numbers)  # as bytes, of which NaN is the same as itself
