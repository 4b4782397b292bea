"""Writes a quantized checkpoint tensor by tensor: a shard of it in memory at most, resumable, whole files."""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..files import complete_or_absent, try_place, write_whole
from ..quiet import quiet_imports
from ..temporary import is_temporary, sweep
from .apply import quantize_modules
from .checkpoint import SHARD
from .manifest import NAME, CheckpointError, File, Manifest
from .recipes import RECIPES, T5, Scheme, check_possible
from .source import Tensor, check_source, identity, other_files, tensors_of

PROGRESS = "quantization.partial.json"
MAX_SHARD = 2**30
_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class OutError(CheckpointError):
    """A folder that no quantized checkpoint can be written to."""


def quantize_checkpoint(
    source: str | Path,
    out: str | Path,
    recipe: str,
    text_encoder: str = "auto",
    dtype: str | None = None,
    max_shard: int = MAX_SHARD,
    tell: Callable[[str], None] = lambda text: None,
) -> Manifest:
    """Write the checkpoint in the folder `source`, quantized by `recipe`, to the folder `out`.

    An interrupted run is gone on with when it is called again with the same arguments. The manifest is written last:
    without it the folder is no checkpoint.

    Args:
        text_encoder: a scheme of `TEXT_ENCODER_SCHEMES`; "auto": the recipe's, "native": as it is.
        dtype: of what is not quantized, by name; None: what the transformer is stored in.
        max_shard: bytes of a weight file, at most, unless one tensor is larger.

    Raises:
        OutError: for an `out` that holds something else or lies in `source`, and too little room on its disk.
        CheckpointError: for a source that is quantized already, incomplete or broken, or that has links out of it.
            Both come before anything is written, except for a file that cannot be read.
        ValueError: for a recipe that is unknown or that no device of this machine can run.
        OSError: for a file that cannot be written.
    """
    source, out = Path(source), Path(out)
    if recipe not in RECIPES:
        raise ValueError(f"recipe={recipe!r} is unknown; allowed: {', '.join(map(repr, RECIPES))}")
    check_possible(recipe)
    chosen = RECIPES[recipe]
    scheme = (
        chosen.text_encoder if text_encoder == "auto" else None if text_encoder == "native" else Scheme(text_encoder)
    )
    check_source(source)
    _check_out(out, source)
    parts = {
        "transformer": tensors_of(source / "transformer", chosen.scheme_of),
        "text_encoder": tensors_of(source / "text_encoder", lambda name: scheme if re.fullmatch(T5, name) else None),
    }
    dtype = dtype or _NAMES.get(next(t.stored for t in parts["transformer"] if t.scheme), "float32")
    if Scheme.FP8 in chosen.schemes and dtype != "bfloat16":
        raise ValueError(f"recipe={recipe!r}: torchao makes rowwise fp8 of bfloat16 weights, not of {dtype}")
    text_encoder_scheme = None if scheme is None else scheme.value
    torchao = importlib.metadata.version("torchao")
    order: dict[str, Any] = {"recipe": recipe, "text_encoder": text_encoder_scheme, "dtype": dtype, "torchao": torchao}
    shards = {
        f"{part}/{SHARD.format(number)}": tensors
        for part, all_tensors in parts.items()
        for number, tensors in enumerate(_split(all_tensors, getattr(torch, dtype), max_shard), start=1)
    }
    others = other_files(source)
    everything = identity(source, (tensor for shard in shards.values() for tensor in shard), others)
    order |= {"source": everything, "max_shard": max_shard}
    done = _done(out, order)
    _check_room(out, shards, others, source, done, getattr(torch, dtype))
    for folder in {(out / name).parent for name in (*shards, *others)}:
        sweep(folder)  # those, too, in which all is done
    files = {}
    progress = _Progress(out, order, dict(done))
    progress.save()
    for number, (name, tensors) in enumerate(shards.items(), start=1):
        if name not in done:
            tell(f"{name} ({number} of {len(shards)})")
            _write_shard(out / name, tensors, getattr(torch, dtype))
            progress.add(name)
        files[name] = progress.files[name]
    for name in others:
        if name not in done:
            tell(name)
            _copy(source / name, out / name)
            progress.add(name)
        files[name] = progress.files[name]
    manifest = Manifest(recipe, text_encoder_scheme, dtype, torchao, files)
    manifest.write(out)
    (out / PROGRESS).unlink(missing_ok=True)
    return manifest


@dataclass(frozen=True)
class _Progress:
    """The files that are finished, kept in the folder so that another run can go on."""

    out: Path
    order: dict
    files: dict[str, File]

    def add(self, name: str) -> None:
        self.files[name] = File.of(self.out / name)
        self.save()

    def save(self) -> None:
        files = {name: dataclasses.asdict(file) for name, file in self.files.items()}
        write_whole(self.out / PROGRESS, json.dumps({"order": self.order, "files": files}).encode())


def _split(tensors: Iterable[Tensor], dtype: torch.dtype, max_shard: int) -> Iterator[list[Tensor]]:
    shard: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.size(dtype) > max_shard:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.size(dtype)
    yield shard


def _check_out(out: Path, source: Path) -> None:
    if out.resolve().is_relative_to(source.resolve()):
        raise OutError(f"{out} lies in {source}, of which it would become a part; name a folder elsewhere")
    try:
        if out.exists() and not out.is_dir():
            raise OutError(f"{out} is a file; name a folder that is new or empty")
        try_place(out / PROGRESS)
    except OSError as error:
        raise OutError(f"{out} cannot be written ({error.strerror}); name another folder") from None


def _done(out: Path, order: dict) -> dict[str, File]:
    """The finished files of an interrupted run of the same order; none of a folder that is empty or not there."""
    there = {path.name for path in out.iterdir() if not is_temporary(path)} if out.exists() else set()
    if not there:
        return {}
    if PROGRESS not in there:
        if NAME in there:
            raise OutError(f"{out} holds a quantized checkpoint already; remove it or name another folder")
        raise OutError(f"{out} is not empty, and nothing in it says how to go on; name another folder")
    try:
        state = json.loads((out / PROGRESS).read_text(encoding="utf-8"))
        before, files = state["order"], {name: File(**file) for name, file in state["files"].items()}
        recipe, dtype = before["recipe"], before["dtype"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise OutError(f"{out / PROGRESS} cannot be read: remove {out} or name another folder") from None
    if before != order:
        raise OutError(
            f"{out} holds part of another checkpoint ({recipe}, {dtype}) or of a source that has changed; remove it or"
            " name another folder"
        )
    return {name: file for name, file in files.items() if (out / name).is_file() and File.of(out / name) == file}


def _check_room(
    out: Path,
    shards: dict[str, list[Tensor]],
    others: list[str],
    source: Path,
    done: dict[str, File],
    dtype: torch.dtype,
) -> None:
    needed = sum(tensor.size(dtype) for name, shard in shards.items() if name not in done for tensor in shard)
    needed += sum((source / name).stat().st_size for name in others if name not in done)
    parent = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise OutError(f"{out} needs {needed / 1e9:.2f} GB, its disk has {free / 1e9:.2f} GB left")


def _write_shard(path: Path, tensors: list[Tensor], dtype: torch.dtype) -> None:
    with quiet_imports():
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    whole = {}
    for tensor in tensors:
        try:
            with safe_open(tensor.path, framework="pt") as file:
                value = file.get_tensor(tensor.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{tensor.path} cannot be read: {error}") from None
        value = value.to(tensor.dtype(dtype)) if value.is_floating_point() else value
        whole[tensor.name] = _quantized(value, tensor.scheme) if tensor.scheme else value.clone()
    flat, metadata = flatten_tensor_state_dict(whole)
    with complete_or_absent(path) as partial:
        try:
            save_file({name: value.contiguous() for name, value in flat.items()}, partial, metadata=metadata)
        except SafetensorError as error:  # a full disk, among others
            raise OSError(errno.EIO, str(error), str(path)) from None
        _sort_metadata(partial)


def _sort_metadata(path: Path) -> None:
    """safetensors writes the metadata in an order of chance: sorted, the same order makes the same file."""
    with path.open("r+b") as file:
        text = file.read(int.from_bytes(file.read(8), "little"))
        header = json.loads(text)
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) != len(text.rstrip(b" ")):
            raise OSError(errno.EIO, "its header is not as safetensors writes it", str(path))
        file.seek(8)
        file.write(ordered)


def _quantized(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    holder = nn.ModuleDict({"linear": linear})
    quantize_modules(holder, lambda name: scheme)
    return linear.weight.detach()


def _copy(source: Path, path: Path) -> None:
    with complete_or_absent(path) as partial:
        shutil.copyfile(source, partial)
