"""`--lora PATH[:WEIGHT]`: adapters of the transformer, several at once."""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .console import UsageError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Lora:
    """An adapter: a file, a folder with one file, or the id of a repository of the Hub."""

    source: str
    weight: float


def parse(value: str) -> Lora:
    """What `--lora` says.

    Raises:
        UsageError: for what is not there, no safetensors file, or no weight, and where peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise UsageError("--lora", repr(value), "needs peft: pip install peft")
    source, colon, last = value.rpartition(":")
    weight = 1.0
    if colon and not os.path.exists(value):
        try:
            weight = float(last)
        except ValueError:
            words = "must be PATH or PATH:WEIGHT, such as style.safetensors:0.8"
            raise UsageError("--lora", repr(value), words) from None
    else:
        source = value
    if not -10 <= weight <= 10:  # written so that NaN fails
        raise UsageError("--lora", repr(value), "has a weight that is not from -10 to 10")
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):  # which takes a name that is too long for one that is not there
        files = sorted(path.glob(f"*{_SUFFIX}"))
        if len(files) != 1:
            raise UsageError("--lora", repr(source), f"has {len(files)} {_SUFFIX} files in it; name one of them")
        return Lora(str(files[0]), weight)
    if os.path.exists(path):
        if path.suffix != _SUFFIX:
            raise UsageError("--lora", repr(source), f"must be a {_SUFFIX} file: others can hold programs")
        return Lora(str(path), weight)
    if not _HUB_ID.fullmatch(source) or source.endswith(_SUFFIX):
        raise UsageError("--lora", repr(source), "is not there; must be a file, a folder or a Hub id (owner/name)")
    return Lora(source, weight)


def load(pipe: Any, loras: list[Lora]) -> None:
    """Put adapters on a pipeline, each with its weight.

    Raises:
        UsageError: for a file that cannot be loaded.
    """
    names = [f"lora_{number}" for number in range(1, len(loras) + 1)]
    for name, lora in zip(names, loras, strict=True):
        try:
            with warnings.catch_warnings():
                # peft warns of every adapter but the first that it is not the first.
                warnings.filterwarnings("ignore", "Already found a `peft_config`")
                pipe.load_lora_weights(lora.source, adapter_name=name, use_safetensors=True)
        except Exception as error:  # whatever a library dies of while it reads a file
            reason = " ".join(str(error).split())[:500]
            raise UsageError("--lora", repr(lora.source), f"cannot be loaded ({reason})") from error
    if names:
        pipe.set_adapters(names, [lora.weight for lora in loras])
