"""A pipeline in a memory limit: fitted anew for each generation, and on a GPU a model at a time where it has to be."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch

from .config import EngineConfig
from .fit.choice import LimitError
from .fit.pipeline import fit_generation
from .fit.request import Request
from .hooks import moves_weights
from .lowering import report_memory


class MemoryLimitMixin:
    """What `EngineConfig.memory_limit` adds to a pipeline: `_asked_config` is its engine as the user gave it,
    `_engine_config` as it was resolved when the pipeline was made."""

    def to(self, *args: Any, **kwargs: Any) -> MemoryLimitMixin:
        """As in diffusers. Where a memory limit asks for it, a GPU gets each model while it runs, not all at once."""
        device = _device(*args, **kwargs)
        if device is None or device.type == "cpu" or self._asked_config.memory_limit is None:
            return super().to(*args, **kwargs)
        if getattr(self, "_all_hooks", None):  # diffusers' own, of offloading by model: it is on already
            return self
        if not self._offloads_on(device):
            return super().to(*args, **kwargs)
        dtype = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)), None)
        if dtype is not None:
            super().to(dtype)
        self.enable_model_cpu_offload(device=device)
        return self

    def _offloads_on(self, device: torch.device) -> bool:
        """Whether a generation of the model's own size has to on `device`, or does not fit even then."""
        config, asked = self._engine_config, self._asked_config
        config = dataclasses.replace(config, pack_weights=asked.pack_weights, vae_memory=asked.vae_memory)
        try:
            _, choice = fit_generation(self, config, Request.default(self.transformer.config, self._reference), device)
        except LimitError:
            return True
        return choice is not None and choice.option.offloads

    def _request(self, *args: Any, **kwargs: Any) -> Request | None:
        """The size of what a call of the parent with these arguments makes; None where no limit asks for it."""
        if self._asked_config.memory_limit is None:
            return None
        arguments = inspect.signature(self._reference.__call__).bind_partial(self, *args, **kwargs).arguments
        return Request.of_call(self.transformer.config, self._reference, arguments)

    def _fitted(self, request: Request | None) -> EngineConfig:
        """The engine for what is made now: with a memory limit, what fits at its size and where the weights are."""
        config, asked = self._engine_config, self._asked_config
        if asked.memory_limit is None:
            return config
        request = request or Request.default(self.transformer.config, self._reference)
        device = self._execution_device
        config = dataclasses.replace(config, pack_weights=asked.pack_weights, vae_memory=asked.vae_memory)
        config, choice = fit_generation(self, config, request, device)
        self._report = self._report.with_line(report_memory(choice, asked.memory_limit, str(request)))
        if choice is not None and choice.option.offloads and not moves_weights(self.transformer):
            self.enable_model_cpu_offload(device=device)
        return config


def _device(*args: Any, **kwargs: Any) -> torch.device | None:
    """The device among the arguments of a pipeline's `to`."""
    value = next((value for value in (*args, kwargs.get("device")) if isinstance(value, str | torch.device)), None)
    return None if value is None else torch.device(value)
