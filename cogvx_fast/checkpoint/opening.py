"""A checkpoint that a pipeline is about to be made of: what it is, whether it is the right kind, and in which dtype."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import machine
from .check import check_scheduler, check_tensors, made_of
from .description import CLASSES, Checkpoint, check_vocabulary, describe, folder_reader, hub_reader
from .errors import CheckpointError, said
from .kinds import why_not
from .tensors import STEMS, stored_dtype


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose JSON files were read and found in order.

    Attributes:
        source: a folder or a Hub id, as it was named.
        folder: where its files are; None while only its JSON files are here.
        configs: those of its parts, by name.
        given: parts that are not taken from it.
        variant: of its files, see `stored_tensors`.
    """

    source: str
    folder: Path | None
    checkpoint: Checkpoint
    configs: dict[str, dict[str, Any]]
    given: frozenset[str] = frozenset()
    variant: str | None = None

    def in_folder(self, folder: Path) -> Opened:
        """This checkpoint after it was downloaded into `folder`."""
        stored = stored_dtype(folder, variant=self.variant)
        return dataclasses.replace(
            self, folder=folder, checkpoint=dataclasses.replace(self.checkpoint, stored_dtype=stored)
        )

    def check_files(self, apart: Collection[str] = ()) -> None:
        """Raise a `CheckpointError` unless the files hold what the configurations say.

        Args:
            apart: parts whose files are not plain weights, and are checked elsewhere.
        """
        assert self.folder is not None
        for part in STEMS:
            # One that a library has quantized holds other tensors than its configuration makes.
            if part in self.configs and part not in apart and not self.configs[part].get("quantization_config"):
                model = made_of(part, self.configs[part], self.source)
                check_tensors(self.folder, part, model, self.variant)
        if "scheduler" in self.configs:
            check_scheduler(self.checkpoint.scheduler_class, self.configs["scheduler"], self.source)
        if "tokenizer" not in self.given:
            check_vocabulary(self.folder)

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """What a library dies of on a value that it takes as it is, as a `CheckpointError`: no one can list these."""
        try:
            yield
        except (OSError, ValueError, RuntimeError, MemoryError):  # they say what it is; and memory is no fault of it
            raise
        except Exception as error:
            raise CheckpointError(f"cannot be loaded ({said(error)})", self.source) from error


def opened(
    source: Any, pipeline: str | None = None, arguments: Mapping[str, Any] | None = None, **hub: Any
) -> Opened | None:
    """The checkpoint `source`, a folder or a Hub id; None for an id of which nothing can be had.

    Args:
        pipeline: name of diffusers' class that it is for; None: of any.
        arguments: of `from_pretrained`: parts among them are not taken from the checkpoint.
        hub: arguments of a download.

    Raises:
        CheckpointError: for a configuration that is missing, broken or out of bounds, and for another kind of
            checkpoint than `pipeline` takes.
    """
    arguments = arguments or {}
    given, variant = frozenset(arguments) & CLASSES.keys(), arguments.get("variant")
    folder = Path(source) if os.path.isdir(source) else None
    stored = None if folder is None else stored_dtype(folder, variant=variant)
    read = hub_reader(str(source), **hub) if folder is None else folder_reader(folder)
    try:
        checkpoint, configs = describe(str(source), read, stored, given)
    except CheckpointError:
        raise
    except (OSError, ValueError):  # no such id, no access, no network
        return None
    transformer = configs.get("transformer") or getattr(arguments.get("transformer"), "config", None)
    reason = (
        None if transformer is None or pipeline is None else why_not(pipeline, transformer, checkpoint.pipeline_class)
    )
    if reason is not None:
        raise CheckpointError(reason, source)
    return Opened(str(source), folder, checkpoint, configs, given, variant)


def default_dtype(checkpoint: Checkpoint, arguments: Mapping[str, Any]) -> tuple[torch.dtype | None, str]:
    """The dtype of all parts where `from_pretrained` was given none, and why in words; None where it was.

    Left alone, transformers loads the text encoder as it is stored and diffusers the rest in float32, and the first
    product of both fails.
    """
    if arguments.get("dtype") is not None:
        return None, ""
    for part in STEMS:
        own = getattr(arguments.get(part), "dtype", None)
        if isinstance(own, torch.dtype) and own.is_floating_point:
            return own, f"as the {part} that was given"
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        stored = checkpoint.stored_dtype
        return (
            getattr(torch, stored or checkpoint.native_dtype),
            "as the checkpoint is stored" if stored else "as its kind was trained",
        )
    return getattr(torch, machine.cpu_dtype()), "what this CPU is good at"
