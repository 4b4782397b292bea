"""Compares what a checkpoint's files hold with what its configurations make, before a weight is read.

Libraries fill what is missing with random numbers and pass over what they do not know: a video comes out, and it is not
the model's.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXTransformer3DModel,
)
from torch import nn
from transformers import PreTrainedTokenizerBase, T5Config, T5EncoderModel, T5Tokenizer

from ..config import shown
from .description import CONFIGS
from .errors import CheckpointError, said
from .tensors import stored_tensors

_CLASSES: dict[str, Any] = {"transformer": CogVideoXTransformer3DModel, "vae": AutoencoderKLCogVideoX}


def made_of(part: str, config: Mapping[str, Any], source: object) -> nn.Module:
    """The model of a configuration that was checked, without weights."""
    _check_kinds(part, config, T5Config().to_dict() if part == "text_encoder" else _defaults(_CLASSES[part]), source)
    try:
        with init_empty_weights(include_buffers=False), torch.no_grad():
            if part == "text_encoder":
                return T5EncoderModel(T5Config(**config))
            return _CLASSES[part].from_config(dict(config))
    except Exception as error:
        raise CheckpointError(f"its {CONFIGS[part]} makes no model ({said(error)})", source) from None


def _defaults(cls: Any) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(cls.__init__).parameters.items()}


def _check_kinds(part: str, config: Mapping[str, Any], defaults: Mapping[str, Any], source: object) -> None:
    """Raise a `CheckpointError` for a value of another kind than its default: some are used in a step only."""
    for name, value in config.items():
        default = defaults.get(name)
        for kind, allowed in ((bool, "true or false"), (str, "text"), (int | float, "a number")):
            if isinstance(default, kind):
                if not isinstance(value, kind) or isinstance(value, bool) != isinstance(default, bool):
                    raise CheckpointError(f"its {CONFIGS[part]} has {name}={shown(value)}; must be {allowed}", source)
                break


def check_tensors(folder: Path, part: str, model: nn.Module, variant: str | None = None) -> None:
    """Raise a `CheckpointError` unless the files of `part` hold the tensors of `model`, all of them and no other."""
    stored = stored_tensors(folder, part, variant)
    known = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # Two names of one tensor: either is enough.
    ties = dict(getattr(model, "_tied_weights_keys", None) or {})
    tied = {name: other for name, other in ties.items() if name in known and other in known}
    spared = {other if name in stored else name for name, other in tied.items()}
    where = folder / part
    missing = [name for name in known if name not in stored and name not in spared]
    if missing:
        raise CheckpointError(f"lacks {_listed(missing)} of its {part}", where)
    for name, shape in known.items():
        if name in stored and stored[name].shape != shape:
            raise CheckpointError(
                f"{name} has shape {_shape(stored[name].shape)}; must be {_shape(shape)}, as the configuration says",
                stored[name].path,
            )
    passed_over = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    known_or_computed = known.keys() | {name for name, _ in model.named_buffers()}
    surplus = [
        name for name in stored.keys() - known_or_computed if not any(pattern.search(name) for pattern in passed_over)
    ]
    if surplus:
        raise CheckpointError(f"has {_listed(surplus)}, for which its configuration has no place", where)


def check_scheduler(name: str, config: Mapping[str, Any], source: object) -> None:
    """Raise a `CheckpointError` unless diffusers' class `name` can be made of a configuration, and make a step."""
    scheduler = getattr(diffusers, name, None)
    if scheduler is None or not hasattr(scheduler, "from_config"):
        raise CheckpointError(f"its scheduler is a {name}, which diffusers does not have", source)
    _check_kinds("scheduler", config, _defaults(scheduler), source)
    try:
        _try_step(scheduler.from_config(dict(config)))
    except Exception as error:
        raise CheckpointError(f"its {CONFIGS['scheduler']} makes no {name} ({said(error)})", source) from None


def _try_step(scheduler: Any) -> None:
    """One step of one number: what its configuration names is looked at no earlier. Of the family's own schedulers."""
    sample = torch.zeros(1, dtype=torch.float32, device="cpu")
    if isinstance(scheduler, CogVideoXDDIMScheduler | CogVideoXDPMScheduler):
        scheduler.set_timesteps(1)
        first = scheduler.timesteps[0]
        if isinstance(scheduler, CogVideoXDPMScheduler):
            scheduler.step(sample, None, first, None, sample)
        else:
            scheduler.step(sample, first, sample)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, source: object, text_encoder: Any = None) -> None:
    """Raise a `CheckpointError` for a tokenizer that knows no words, or more than `text_encoder`'s configuration."""
    vocabulary = getattr(text_encoder, "vocab_size", None)
    pieces = len(tokenizer) - len(set(tokenizer.all_special_tokens))
    if pieces < 1:
        raise CheckpointError("its tokenizer is empty: every prompt would mean the same", source)
    if vocabulary is not None and len(tokenizer) > vocabulary:
        raise CheckpointError(f"its tokenizer has {len(tokenizer)} words, its text encoder {vocabulary}", source)


def check_stored_tokenizer(folder: Path, text_encoder: Any) -> None:
    """Load the tokenizer of the checkpoint in `folder`, and check it as `check_tokenizer` does."""
    try:
        tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer")
    except Exception as error:
        raise CheckpointError(f"its tokenizer cannot be loaded ({said(error)})", folder) from None
    check_tokenizer(tokenizer, folder, text_encoder)


def _listed(names: Collection[str]) -> str:
    first, *rest = sorted(names)
    return f"the tensor {first}" if not rest else f"the tensor {first} and {len(rest)} more"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"
