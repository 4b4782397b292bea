"""What a checkpoint says of itself: read from its JSON files alone, before any weight is touched."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.text import Text

from cogvx_fast.family import Variant

from .console import UsageError, messages

ARGUMENT = "--model"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_VOCABULARIES = ("tokenizer/tokenizer.json", "tokenizer/spiece.model")
_WEIGHT_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Checkpoint:
    """A CogVideoX checkpoint as its JSON files describe it.

    Attributes:
        source: a folder, or the id of a repository on the Hugging Face Hub.
        stored_dtype: of the transformer's weights; None where that is not known before they are read.
        num_train_timesteps: of its scheduler, the most steps that it can take.
        variant: which member of the family it is.
    """

    source: str
    pipeline_class: str = "CogVideoXPipeline"
    tokenizer_class: str = "T5Tokenizer"
    stored_dtype: str | None = None
    num_train_timesteps: int = 1000
    variant: Variant = field(default_factory=Variant)

    @property
    def native_dtype(self) -> str:
        """The half precision its weights are stored in; else the one its kind was trained in."""
        if self.stored_dtype in ("float16", "bfloat16"):
            return self.stored_dtype
        return self.variant.trained_dtype


def read_checkpoint(model: str) -> Checkpoint:
    """Read the configuration of `model`, a local folder or else the id of a repository on the Hugging Face Hub.

    Raises:
        UsageError: if there is none, or it is not a CogVideoX in diffusers format.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        _check_vocabulary(folder)
        return _parse(str(folder), lambda name: _read_local(folder, name), _stored_dtype(folder))
    if folder.exists():
        raise UsageError(ARGUMENT, repr(model), "is a file; must be the folder of a checkpoint in diffusers format")
    if not _HUB_ID.fullmatch(model):
        raise UsageError(
            ARGUMENT, repr(model), "no such folder; must be a checkpoint in diffusers format or a Hub id (owner/name)"
        )
    with _asking_the_hub(model):
        return _parse(model, lambda name: _read_from_hub(model, name), stored_dtype=None)


def read_config(model: str, name: str) -> dict[str, Any]:
    """A JSON file of a checkpoint that `read_checkpoint` has taken, such as "vae/config.json"."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _read_local(folder, name)
    with _asking_the_hub(model):
        return _read_from_hub(model, name)


def _parse(source: str, read: Callable[[str], dict[str, Any]], stored_dtype: str | None) -> Checkpoint:
    index = read("model_index.json")
    pipeline_class = str(index.get("_class_name"))
    if "CogVideoX" not in pipeline_class:
        raise UsageError(ARGUMENT, repr(source), f"is a {pipeline_class}; must be a CogVideoX checkpoint")
    transformer = read("transformer/config.json")
    transformer_class = str(transformer.get("_class_name"))
    if "CogVideoXTransformer3DModel" not in transformer_class:
        raise UsageError(
            ARGUMENT, repr(source), f"its transformer is a {transformer_class}; must be a CogVideoXTransformer3DModel"
        )
    scheduler = read("scheduler/scheduler_config.json")
    return Checkpoint(
        source,
        pipeline_class,
        tokenizer_class=(index.get("tokenizer") or [None, Checkpoint.tokenizer_class])[1],
        stored_dtype=stored_dtype,
        num_train_timesteps=scheduler.get("num_train_timesteps", Checkpoint.num_train_timesteps),
        variant=Variant.of(transformer),
    )


def _read_local(folder: Path, name: str) -> dict[str, Any]:
    try:
        return _read_json(folder / name)
    except FileNotFoundError:
        raise UsageError(
            ARGUMENT, repr(str(folder)), f"has no {name}; must be a CogVideoX checkpoint in diffusers format"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(ARGUMENT, repr(str(folder)), f"its {name} cannot be read ({error})") from None


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
    from huggingface_hub import hf_hub_download

    try:
        return _read_json(Path(hf_hub_download(model, name)))
    except (OSError, ValueError) as error:  # not found, not allowed, offline: all of the hub's errors are one of these
        reason = " ".join(str(error).split())
        raise UsageError(
            ARGUMENT,
            repr(model),
            f"is no folder here, and its {name} could not be had from the Hugging Face Hub ({reason})",
        ) from None


def _check_vocabulary(folder: Path) -> None:
    # Without one, transformers makes an empty tokenizer, and every prompt means the same.
    if (folder / "model_index.json").is_file() and not any((folder / name).is_file() for name in _VOCABULARIES):
        raise UsageError(ARGUMENT, repr(str(folder)), f"has no tokenizer: neither {' nor '.join(_VOCABULARIES)}")


def _read_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def _stored_dtype(folder: Path) -> str | None:
    """The commonest dtype in the header of the transformer's first safetensors file; None without one."""
    for path in sorted((folder / "transformer").glob("*.safetensors")):
        with path.open("rb") as file:
            try:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            except (ValueError, OverflowError, MemoryError):
                return None  # not safetensors; loading says so better
        counts = Counter(entry["dtype"] for name, entry in header.items() if name != "__metadata__")
        return _WEIGHT_DTYPES.get(counts.most_common(1)[0][0]) if counts else None
    return None
