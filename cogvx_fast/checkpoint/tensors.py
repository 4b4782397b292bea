"""Which tensors the safetensors files of a part hold, by their headers: names, shapes, dtypes, and that no byte lacks.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .description import read_json
from .errors import CheckpointError

# The names that diffusers and transformers give the weights of a part.
STEMS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
_LARGEST_HEADER = 100_000_000  # bytes, as the format has it
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
_BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "U64": 64, "U32": 32, "U16": 16}
_HALF_OR_MORE = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; `dtype` is torch's name, or the format's where weights may not have it."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def stored_tensors(folder: Path, part: str, variant: str | None = None) -> dict[str, Stored]:
    """The tensors of `part` of the checkpoint in `folder`, by name, as loading it would find them.

    Args:
        variant: "fp16" for files such as `model.fp16.safetensors`; a part that has none of those is read without.

    Raises:
        CheckpointError: for a part without safetensors files, with a file that is missing, cut off or broken, or with
            a tensor that no weight can be.
    """
    where = folder / part
    tensors: dict[str, Stored] = {}
    try:
        files = _files(where, STEMS[part], variant)
    except OSError as error:  # a folder that may not be looked into
        raise CheckpointError(f"cannot be read ({error.strerror})", where) from None
    for path in files:
        for name, stored in read_header(path).items():
            if stored.dtype not in _HALF_OR_MORE.values():
                allowed = ", ".join(_HALF_OR_MORE.values())
                raise CheckpointError(f"{name} is of {stored.dtype}; must be one of {allowed}", path)
            tensors[name] = stored
    return tensors


def stored_dtype(folder: Path, part: str = "transformer", variant: str | None = None) -> str | None:
    """The commonest dtype of the tensors of a part; None where nothing there can be read."""
    try:
        tensors = stored_tensors(folder, part, variant)
    except CheckpointError:
        return None  # loading says it better
    counts = Counter(stored.dtype for stored in tensors.values())
    return counts.most_common(1)[0][0] if counts else None


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file.

    Raises:
        CheckpointError: if it is none, or shorter or longer than its header says.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise CheckpointError("is no file", path)
        size = status.st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise CheckpointError("is no safetensors file, or cut off", path)
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror})", path) from None
    except RecursionError:
        raise CheckpointError("is no safetensors file", path) from None
    except CheckpointError:
        raise
    except ValueError:
        raise CheckpointError("is no safetensors file", path) from None
    if not isinstance(header, dict):
        raise CheckpointError("is no safetensors file", path)
    tensors, end = {}, 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        stored, last = _entry(path, name, entry)
        tensors[name], end = stored, max(end, last)
    if 8 + length + end != size:
        raise CheckpointError(f"has {size} bytes instead of {8 + length + end}: it was cut off or added to", path)
    return tensors


def _entry(path: Path, name: str, entry: Any) -> tuple[Stored, int]:
    """The tensor that an entry of a header describes, and where its last byte is."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, begin, end))
        fits = whole and (end - begin) * 8 == math.prod(shape) * _BITS[dtype]
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise CheckpointError(f"describes {name!r} in a way that cannot be", path)
    return Stored(path, tuple(shape), _HALF_OR_MORE.get(dtype, dtype)), end


def _files(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """The files that hold the tensors of the part in `folder`."""
    if not folder.is_dir():
        raise CheckpointError(f"has no folder {folder.name}; must be a CogVideoX checkpoint", folder.parent)
    for infix in ("",) if variant is None else (f".{variant}", ""):
        index = folder / f"{stem}.safetensors.index{infix}.json"
        single = folder / f"{stem}{infix}.safetensors"
        # diffusers looks for the index first, transformers for the one file.
        sharded = index.is_file() and (stem == STEMS["transformer"] or not single.is_file())
        if sharded:
            return _shards(index)
        if single.exists():
            return [single]
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"has weights in {pickles[0]} only; must be safetensors: loading a pickle can run any code", folder
        )
    raise CheckpointError(f"has no weights: neither {stem}.safetensors nor its index", folder)


def _shards(index: Path) -> list[Path]:
    try:
        weight_map = read_json(index).get("weight_map")
    except FileNotFoundError:
        weight_map = None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("has no weight_map; must name the file of each tensor", index)
    names = {name: None for name in weight_map.values() if isinstance(name, str)}
    odd = [name for name in weight_map.values() if not isinstance(name, str) or Path(name).name != name]
    if odd:
        raise CheckpointError(f"names the file {odd[0]!r}; must be one beside it", index)
    # Unlike a Path's own, this takes a name that is too long for one that is not there.
    missing = [name for name in names if not os.path.isfile(index.parent / name)]
    if missing:
        raise CheckpointError(f"names {missing[0]}, which is not there", index)
    return [index.parent / name for name in sorted(names)]
