"""The checkpoint that `--model` names: its description, from JSON files alone, before any weight is touched."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.text import Text

from cogvx_fast.checkpoint import Checkpoint, CheckpointError, describe, folder_reader, stored_dtype
from cogvx_fast.checkpoint.description import check_vocabulary, hub_reader
from cogvx_fast.quantization.manifest import is_quantized_checkpoint, read_manifest

from .console import UsageError, messages

ARGUMENT = "--model"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def read_checkpoint(model: str) -> Checkpoint:
    """Read the description of `model`, a local folder or else the id of a repository on the Hugging Face Hub.

    Raises:
        UsageError: if there is none, or it is not a CogVideoX in diffusers format.
    """
    # Unlike those of a Path, these take names that are too long, or of a user that there is not, for what is not there.
    name = os.path.expanduser(model)
    folder = Path(name)
    if os.path.isdir(name):
        with refused(folder):
            checkpoint, _ = describe(str(folder), folder_reader(folder), stored_dtype(folder))
            check_vocabulary(folder)
            if is_quantized_checkpoint(folder):
                manifest = read_manifest(folder)
                return dataclasses.replace(checkpoint, recipe=manifest.recipe, dtype=manifest.dtype)
            return checkpoint
    if os.path.exists(name):
        raise UsageError(ARGUMENT, repr(model), "is a file; must be the folder of a checkpoint in diffusers format")
    if not _HUB_ID.fullmatch(model):
        raise UsageError(
            ARGUMENT, repr(model), "no such folder; must be a checkpoint in diffusers format or a Hub id (owner/name)"
        )
    with _asking_the_hub(model), refused(model):
        return describe(model, lambda name: _read_from_hub(model, name))[0]


def read_config(model: str, name: str) -> dict[str, Any]:
    """A JSON file of a checkpoint that `read_checkpoint` has taken, such as "vae/config.json"."""
    if os.path.isdir(model):
        folder = Path(model)
        with refused(folder):
            return folder_reader(folder)(name)
    with _asking_the_hub(model), refused(model):
        return _read_from_hub(model, name)


@contextlib.contextmanager
def refused(model: object) -> Iterator[None]:
    """What is wrong with a checkpoint as what is wrong with the argument that names it."""
    try:
        yield
    except CheckpointError as error:
        raise UsageError(ARGUMENT, repr(str(model)), within(model, error)) from None


def within(model: object, error: Exception) -> str:
    """What an error says of a checkpoint that is named already; a file in it is not."""
    return str(error).removeprefix(f"{model}: ").removeprefix(f"{model}/")


@contextlib.contextmanager
def _asking_the_hub(model: str) -> Iterator[None]:
    """One line in place of a bar for each small file and of the log of retries."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    verbosity, had_bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    disable_progress_bars()
    try:
        with messages.status(Text(f"asking the Hugging Face Hub for {model}")):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            enable_progress_bars()


def _read_from_hub(model: str, name: str) -> dict[str, Any]:
    try:
        return hub_reader(model)(name)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:  # not found, not allowed, offline: all of the hub's errors are one of these
        reason = " ".join(str(error).split())
        raise UsageError(
            ARGUMENT,
            repr(model),
            f"is no folder here, and its {name} could not be had from the Hugging Face Hub ({reason})",
        ) from None
