"""Writes a quantized checkpoint tensor by tensor: a shard of it in memory at most, resumable, whole files."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import T5Config

from ..checkpoint.check import check_stored_tokenizer
from ..checkpoint.opening import opened
from ..files import write_whole
from ..quiet import quiet_imports
from .apply import quantize_modules
from .checkpoint import SHARD
from .manifest import NAME, CheckpointError, File, Manifest, is_quantized_checkpoint
from .recipes import RECIPES, T5, Scheme, check_possible

PROGRESS = "quantization.partial.json"
MAX_SHARD = 2**30
_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SCALES = 8  # bytes beside a quantized channel, at most: an fp32 scale, a zero point, padding


@dataclass(frozen=True)
class _Tensor:
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
        CheckpointError: for a source that is quantized already, incomplete or broken, an `out` that holds something
            else, or too little room on its disk; before anything is written, except for a file that cannot be read.
        ValueError: for a recipe that is unknown or that no device of this machine can run.
    """
    source, out = Path(source), Path(out)
    if recipe not in RECIPES:
        raise ValueError(f"recipe={recipe!r} is unknown; allowed: {', '.join(map(repr, RECIPES))}")
    check_possible(recipe)
    chosen = RECIPES[recipe]
    scheme = (
        chosen.text_encoder if text_encoder == "auto" else None if text_encoder == "native" else Scheme(text_encoder)
    )
    _check_source(source)
    parts = {
        "transformer": _tensors(source / "transformer", chosen.scheme_of),
        "text_encoder": _tensors(source / "text_encoder", lambda name: scheme if re.fullmatch(T5, name) else None),
    }
    dtype = dtype or _NAMES.get(next(t.stored for t in parts["transformer"] if t.scheme), "float32")
    if Scheme.FP8 in chosen.schemes and dtype != "bfloat16":
        raise ValueError(f"recipe={recipe!r}: torchao makes rowwise fp8 of bfloat16 weights, not of {dtype}")
    text_encoder_scheme = None if scheme is None else scheme.value
    torchao = importlib.metadata.version("torchao")
    order = {"recipe": recipe, "text_encoder": text_encoder_scheme, "dtype": dtype, "torchao": torchao}
    shards = {
        f"{part}/{SHARD.format(number)}": tensors
        for part, all_tensors in parts.items()
        for number, tensors in enumerate(_split(all_tensors, getattr(torch, dtype), max_shard), start=1)
    }
    others = sorted(_others(source))
    done = _done(out, order | {"source": _identity(source), "max_shard": max_shard})
    _check_room(out, shards, others, source, done, getattr(torch, dtype))
    files = {}
    progress = _Progress(out, order | {"source": _identity(source), "max_shard": max_shard}, dict(done))
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


def _check_source(source: Path) -> None:
    if is_quantized_checkpoint(source):
        raise CheckpointError(f"{source} is quantized already; start from the full-precision checkpoint")
    found = opened(source) if source.is_dir() else None
    if found is None:
        raise CheckpointError("is no folder; must be a CogVideoX checkpoint in diffusers format", source)
    for part in ("transformer", "text_encoder"):
        if part not in found.configs:
            raise CheckpointError(f"has no {part}, which is what is quantized", source)
        if found.configs[part].get("quantization_config"):
            raise CheckpointError(f"{source / part} is quantized already; start from the full-precision checkpoint")
    found.check_files()
    if (source / "tokenizer").is_dir():
        check_stored_tokenizer(source, T5Config(**found.configs["text_encoder"]))


def _tensors(folder: Path, scheme_of: Callable[[str], Scheme | None]) -> list[_Tensor]:
    """All tensors of a component, by name; headers are read, not data."""
    tensors = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - no mapping
                    part = file.get_slice(name)
                    scheme = scheme_of(name.removesuffix(".weight")) if name.endswith(".weight") else None
                    tensors.append(_Tensor(name, path, tuple(part.get_shape()), part.get_dtype(), scheme))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not any(tensor.name.endswith(".weight") for tensor in tensors):
        raise CheckpointError(f"{folder} has no weights in safetensors files")
    names = {tensor.name for tensor in tensors}
    if len(names) < len(tensors):
        raise CheckpointError(f"{folder} has tensors in more than one file: keep one of its variants")
    _check_index(folder, names)
    return sorted(tensors, key=lambda tensor: (tensor.path, tensor.name))


def _check_index(folder: Path, names: set[str]) -> None:
    """A file that the index names and that is not there would leave the model without some of its weights."""
    for index in folder.glob("*.safetensors.index.json"):
        missing = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"]) - names
        if missing:
            raise CheckpointError(f"{folder} is incomplete: {sorted(missing)[0]} is in none of its files")


def _split(tensors: Iterable[_Tensor], dtype: torch.dtype, max_shard: int) -> Iterator[list[_Tensor]]:
    shard: list[_Tensor] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.size(dtype) > max_shard:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.size(dtype)
    yield shard


def _others(source: Path) -> Iterator[str]:
    """Files that are copied as they are: all but the weights of transformer and text encoder, and what hides."""
    for path in source.rglob("*"):
        name = path.relative_to(source)
        weights = name.parts[0] in ("transformer", "text_encoder") and name.name != "config.json"
        if path.is_file() and not weights and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix()


def _identity(source: Path) -> list:
    """What tells whether the source is still the same: every weight file's name, size and time."""
    files = sorted(source.rglob("*.safetensors"))
    return [[str(path.relative_to(source)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _done(out: Path, order: dict) -> dict[str, File]:
    """The finished files of an interrupted run of the same order; none of a folder that is empty or not there."""
    if not out.exists() or not any(out.iterdir()):
        return {}
    if (out / NAME).exists():
        raise CheckpointError(f"{out} holds a quantized checkpoint already; remove it or name another folder")
    try:
        state = json.loads((out / PROGRESS).read_text(encoding="utf-8"))
        files = {name: File(**file) for name, file in state["files"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{out} is not empty, and nothing in it says how to go on; name another folder") from None
    if state["order"] != order:
        raise CheckpointError(
            f"{out} holds part of another checkpoint ({state['order'].get('recipe')}, {state['order'].get('dtype')}) or"
            " of a source that has changed; remove it or name another folder"
        )
    return {name: file for name, file in files.items() if (out / name).is_file() and File.of(out / name) == file}


def _check_room(
    out: Path,
    shards: dict[str, list[_Tensor]],
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
        raise CheckpointError(f"{out} needs {needed / 1e9:.2f} GB, its disk has {free / 1e9:.2f} GB left")


def _write_shard(path: Path, tensors: list[_Tensor], dtype: torch.dtype) -> None:
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
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file({name: value.contiguous() for name, value in flat.items()}, partial, metadata=metadata)
        partial.replace(path)
    except SafetensorError as error:  # a full disk, among others
        raise CheckpointError(f"{path} could not be written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def _quantized(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    holder = nn.ModuleDict({"linear": linear})
    quantize_modules(holder, lambda name: scheme)
    return linear.weight.detach()


def _copy(source: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        shutil.copyfile(source, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
