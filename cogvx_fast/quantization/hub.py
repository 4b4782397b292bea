"""Quantized checkpoints on the Hugging Face Hub: known by their manifest, downloaded whole, then like any folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .manifest import NAME, is_quantized_checkpoint

# Of `from_pretrained`, those that say whence and where to files are downloaded.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision")


def hub_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a `from_pretrained` that are meant for the Hub: `HUB_ARGUMENTS`."""
    return {name: arguments[name] for name in HUB_ARGUMENTS if arguments.get(name) is not None}


def quantized_folder(source: Any, hub: Mapping[str, Any]) -> Path | None:
    """The folder of the quantized checkpoint that `source` is, a folder or a Hub id; None: it is no quantized one.

    Of an id the manifest is asked for first, and all else is downloaded if there is one, into the cache that diffusers
    uses. What cannot be asked for (no such id, no access, no network) is left to diffusers, which says so.

    Args:
        hub: arguments of a download, see `hub_arguments`.

    Raises:
        OSError: for a download that breaks off.
    """
    if is_quantized_checkpoint(source):
        return Path(source)
    if not isinstance(source, str) or os.path.exists(source):
        return None
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    try:
        huggingface_hub.hf_hub_download(source, NAME, **hub)
    except (OSError, ValueError, EntryNotFoundError):
        return None
    return Path(huggingface_hub.snapshot_download(source, **hub))
