"""A checkpoint that is to be quantized: its tensors and its other files, as headers and names; no weight is read."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import T5Config

from ..checkpoint import read_json
from ..checkpoint.check import check_stored_tokenizer
from ..checkpoint.opening import opened
from .manifest import CheckpointError, is_quantized_checkpoint
from .recipes import Scheme

INDEX = "model_index.json"
QUANTIZED = ("transformer", "text_encoder")
_DATA = (".json", ".safetensors", ".model", ".txt")  # of a component; neither code nor pickles
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_PAPERS = re.compile(r"(README|LICEN[SC]E|NOTICE)[\w-]*(\.md|\.txt)?", re.IGNORECASE)
_SCALES = 8  # bytes beside a quantized channel, at most: an fp32 scale, a zero point, padding


@dataclass(frozen=True)
class Tensor:
    """A tensor of the source: where it is, its shape and dtype, and the scheme that it gets."""

    name: str
    path: Path
    shape: tuple[int, ...]
    stored: str
    scheme: Scheme | None

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What it becomes in a model of `dtype`: T5's `wo` overflows fp16, transformers keeps it in fp32."""
        return torch.float32 if dtype == torch.float16 and self.name.endswith("DenseReluDense.wo.weight") else dtype

    def size(self, dtype: torch.dtype) -> int:
        """Bytes it will take, at most."""
        count = math.prod(self.shape)
        return count + self.shape[0] * _SCALES if self.scheme else count * self.dtype(dtype).itemsize


def check_source(source: Path) -> None:
    """Raise a `CheckpointError` unless `source` is the folder of a whole CogVideoX that is not quantized yet."""
    if is_quantized_checkpoint(source):
        raise CheckpointError(f"{source} is quantized already; start from the full-precision checkpoint")
    found = opened(source) if source.is_dir() else None
    if found is None:
        raise CheckpointError("is no folder; must be a CogVideoX checkpoint in diffusers format", source)
    for part in QUANTIZED:
        if part not in found.configs:
            raise CheckpointError(f"has no {part}, which is what is quantized", source)
        if found.configs[part].get("quantization_config"):
            raise CheckpointError(f"{source / part} is quantized already; start from the full-precision checkpoint")
    found.check_files()
    if (source / "tokenizer").is_dir():
        check_stored_tokenizer(source, T5Config(**found.configs["text_encoder"]))


def tensors_of(folder: Path, scheme_of: Callable[[str], Scheme | None]) -> list[Tensor]:
    """All tensors of a component, by file and name.

    Raises:
        CheckpointError: for files that are broken, missing, or that hold a tensor twice.
    """
    tensors = []
    for path in sorted(folder.glob("*.safetensors")):
        _check_link(path, folder.parent)
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - no mapping
                    part = file.get_slice(name)
                    scheme = scheme_of(name.removesuffix(".weight")) if name.endswith(".weight") else None
                    tensors.append(Tensor(name, path, tuple(part.get_shape()), part.get_dtype(), scheme))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not any(tensor.name.endswith(".weight") for tensor in tensors):
        raise CheckpointError(f"{folder} has no weights in safetensors files")
    names = {tensor.name for tensor in tensors}
    if len(names) < len(tensors):
        raise CheckpointError(f"{folder} has tensors in more than one file: keep one of its variants")
    return sorted(tensors, key=lambda tensor: (tensor.path, tensor.name))


def other_files(source: Path) -> list[str]:
    """Files that are copied as they are, by their path in `source`.

    These are the data of the components that the index names, without the weights that are quantized, and what the
    folder says of itself and of its licence. Code, pickles and all else stay where they are.

    Raises:
        CheckpointError: for a link that leads out of the checkpoint, and weights in pickles alone.
    """
    found = [INDEX]
    found += [path.name for path in source.iterdir() if _PAPERS.fullmatch(path.name) and path.is_file()]
    index = read_json(source / INDEX)
    found += [f"{part}/config.json" for part in QUANTIZED]
    for part in (part for part, what in index.items() if isinstance(what, list) and part not in QUANTIZED):
        if Path(part).name != part or part == "..":
            raise CheckpointError(f"{source / INDEX} has a component {part!r}; must be the name of a folder")
        found += [f"{part}/{name}" for name in _data_of(source / part)]
    for name in found:
        _check_link(source / name, source)
    return sorted(set(found))


def identity(source: Path, tensors: Iterable[Tensor], others: Iterable[str]) -> list:
    """What tells whether the source is still the same: name, size and time of every file that is read."""
    files = sorted({tensor.path for tensor in tensors} | {source / name for name in others})
    return [[str(path.relative_to(source)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _data_of(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        is_data = path.suffix in _DATA and (path.is_file() or path.is_symlink())
        if is_data and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix()
    pickles = [path for pattern in _PICKLES for path in folder.glob(pattern)]
    if pickles and not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{pickles[0]} is a pickle, which is not copied: {folder} must have safetensors")


def _check_link(path: Path, source: Path) -> None:
    """A link out of the checkpoint would bring a file into the new one that nobody meant to give away.

    The hub's cache is made of links to files that were downloaded, which lie beside a checkpoint.
    """
    target = Path(os.path.realpath(path))
    if not target.is_file():
        raise CheckpointError(f"{path} is not there or no file; must be one, or a link to one in {source}")
    is_download = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    if not is_download and not target.is_relative_to(source.resolve()):
        raise CheckpointError(f"{path} leads out of {source}, to {target}; put the file itself there")
