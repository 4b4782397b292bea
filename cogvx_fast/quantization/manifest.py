"""What a quantized checkpoint says of itself: `quantization.json` in its folder, written last, checked first."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import machine
from ..checkpoint import CheckpointError
from ..files import write_whole
from .recipes import RECIPES, TEXT_ENCODER_SCHEMES, Scheme

NAME = "quantization.json"
FORMAT = 1
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class File:
    """The size in bytes and the SHA-256 of a file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> File:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return cls(path.stat().st_size, digest.hexdigest())


@dataclass(frozen=True)
class Manifest:
    """
    Attributes:
        recipe: of the transformer.
        text_encoder: scheme of the text encoder; None: as it was.
        dtype: name of the torch dtype of all that is not quantized, and of what quantized layers give.
        torchao: the version whose tensors are stored.
        files: every file of the checkpoint but this one, by its path in the folder.
    """

    recipe: str
    text_encoder: str | None
    dtype: str
    torchao: str
    files: dict[str, File]
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        write_whole(folder / NAME, (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode())


def is_quantized_checkpoint(source: Any) -> bool:
    """Whether `source` is a folder that `cogvx-fast quantize` has finished."""
    try:
        return (Path(source) / NAME).is_file()
    except (TypeError, OSError):
        return False


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        CheckpointError: if it cannot be read, or names another format, an unknown recipe or another torchao.
    """
    path = folder / NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("format") != FORMAT:
            raise CheckpointError(f"{path}: format {values.get('format')!r}; this version reads format {FORMAT}")
        files = {name: File(**file) for name, file in values.pop("files").items()}
        manifest = Manifest(files=files, **values)
        _check(manifest)
    except CheckpointError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if manifest.recipe not in RECIPES or manifest.text_encoder not in (None, *TEXT_ENCODER_SCHEMES):
        named = manifest.recipe if manifest.recipe not in RECIPES else manifest.text_encoder
        raise CheckpointError(f"{path}: recipe {named!r} is unknown; this version has {', '.join(map(repr, RECIPES))}")
    installed = machine.installed_version("torchao")
    if manifest.torchao != installed:
        raise CheckpointError(
            f"{folder} holds tensors of torchao {manifest.torchao}, installed is {installed}: pip install"
            f" torchao=={manifest.torchao}, or quantize the full-precision checkpoint again"
        )
    return manifest


def _check(manifest: Manifest) -> None:
    """Raise unless the values are of the kinds that `quantize` writes; names become paths, which stay in the folder."""
    for text in (manifest.recipe, manifest.text_encoder or "", manifest.torchao):
        if not isinstance(text, str):
            raise TypeError(f"{text!r} must be text")
    if manifest.dtype not in DTYPES:
        raise ValueError(f"dtype {manifest.dtype!r} must be one of {', '.join(DTYPES)}")
    for name in manifest.files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{name!r} must be a file in the folder")


def check_small_files(folder: Path, manifest: Manifest) -> None:
    """Raise a `CheckpointError` that names the first file that is missing or has another size, weights that are not
    listed, or a configuration of other content: what can be seen at once."""
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; quantize the checkpoint again")
        if path.stat().st_size != expected.size:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes instead of {expected.size}: truncated?")
    for path in sorted(folder.glob("*/*.safetensors")):
        if path.relative_to(folder).as_posix() not in manifest.files:
            raise CheckpointError(f"{path} is not listed in {NAME}, by which weights are checked")
    _check_contents(folder, {name: file for name, file in manifest.files.items() if name.endswith(".json")})


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raise a `CheckpointError` that names the first file that is missing or changed; all are read for it."""
    check_small_files(folder, manifest)
    _check_contents(folder, manifest.files)


def _check_contents(folder: Path, files: Mapping[str, File]) -> None:
    for name, expected in files.items():
        if File.of(folder / name) != expected:
            raise CheckpointError(f"{folder / name} was changed since it was written: its SHA-256 differs")


def text_encoder_scheme(manifest: Manifest) -> Scheme | None:
    return None if manifest.text_encoder is None else Scheme(manifest.text_encoder)
