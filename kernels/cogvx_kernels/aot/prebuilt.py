"""A cache of compiled kernels, made without a GPU, that Triton finds on a machine with one: what it holds, and whether
it still fits the machine and the versions.

Triton looks a kernel up by a hash of its own sources and binaries, ptxas' version, the target, the kernel's source and
its arguments' types and alignment, and compiles anew, without a word, where it finds nothing. The manifest says what
went into the hash, so that a cache that will not be found can be told from one that will.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.compiler import make_backend
from triton.runtime.cache import triton_key

from .._triton.choice import describe
from .._triton.tuned import TunedKernel, gpu_target
from ..targets import TARGETS
from . import Compiled

MANIFEST = "cogvx-fast-kernels.json"
SCHEMA = 1
_VERSIONS = ("torch", "triton", "cogvx_fast", "python")
_GROUP = "__grp__"  # what triton names the file that lists the others of a kernel, with whole paths


class ManifestError(ValueError):
    """A manifest that is not there or cannot be understood."""


@dataclass(frozen=True)
class Entry:
    """One compiled configuration: the folder its files lie in, and their SHA-256 by name.

    `source` is triton's hash of the kernel's source, with all that it calls.
    """

    kernel: str
    target: str
    configuration: str
    source: str
    folder: str
    files: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """What a cache was built from, and what is in it.

    Attributes:
        versions: of torch, triton, cogvx_fast and Python, for people. What decides is in the hashes; torch is not.
        triton: hash of triton's own files, the compiled library of this Python's wheel among them.
        backends: by target, the hash of triton's backend: ptxas' version and the architecture.
        environment: variables that triton makes part of the key, with their values.
        models: what the entries were compiled for, as descriptions.
    """

    versions: dict[str, str]
    triton: str
    backends: dict[str, str]
    environment: dict[str, str]
    models: list[dict[str, Any]]
    entries: list[Entry]

    @classmethod
    def here(cls, version: str, targets: Iterable[str], models: list[dict[str, Any]], entries: list[Entry]) -> Manifest:
        """A manifest with what this process would look kernels up by; `version` is cogvx_fast's."""
        known = (torch.__version__, triton.__version__, version, platform.python_version())
        versions = dict(zip(_VERSIONS, known, strict=True))
        backends = {target: make_backend(gpu_target(TARGETS[target])).hash() for target in targets}
        key = hashlib.sha256(triton_key().encode()).hexdigest()
        return cls(versions, key, backends, dict(get_cache_invalidating_env_vars()), models, entries)

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA} | dataclasses.asdict(self), indent=1) + "\n"

    def merged(self, before: Manifest | None) -> Manifest:
        """With the entries of an earlier build that was made with the same versions; those of another are left out."""
        if before is None or any(getattr(self, name) != getattr(before, name) for name in ("triton", "environment")):
            return self
        entries = {entry.folder: entry for entry in (*before.entries, *self.entries)}
        backends = before.backends | self.backends
        models = [*before.models, *(model for model in self.models if model not in before.models)]
        return dataclasses.replace(self, backends=backends, models=models, entries=list(entries.values()))


def read(cache: Path) -> Manifest:
    """The manifest of a cache folder.

    Raises:
        ManifestError: if there is none, it is of another schema, or its values are of another kind.
    """
    path = cache / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("schema") != SCHEMA:
            raise ManifestError(f"{path} is of another schema than {SCHEMA}: build the cache again")
        entries = [Entry(**entry) for entry in content.pop("entries")]
        manifest = Manifest(**content, entries=entries)
        _check(manifest)
        return manifest
    except FileNotFoundError:
        raise ManifestError(f"{path} is not there: no cache of `cogvx-fast kernels build`") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(f"{path} cannot be read: {error}") from None


def _check(manifest: Manifest) -> None:
    """Raise unless the values are of the kinds that `build` writes; names become paths, which stay in the cache."""
    texts = [manifest.triton, *(manifest.versions[name] for name in _VERSIONS), *manifest.backends.values()]
    for entry in manifest.entries:
        texts += [entry.kernel, entry.target, entry.configuration, entry.source, *entry.files.values()]
        for name in (entry.folder, *entry.files):
            if not isinstance(name, str) or Path(name).name != name or name == "..":
                raise ValueError(f"{name!r} must be the name of a folder or file in the cache")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{text!r} must be text")


def entry(compiled: Compiled) -> Entry:
    """Where a kernel that was just compiled, or found compiled, lies in triton's cache."""
    kernel, launch = compiled.kernel, compiled.launch
    folder = Path(next(iter(kernel.metadata_group.values()))).parent
    files = {path.name: _sha256(path) for path in sorted(folder.iterdir()) if not path.name.startswith(_GROUP)}
    source = launch.kernel.fn.cache_key
    return Entry(launch.name, compiled.target.name, describe(compiled.config), source, folder.name, files)


def problems(cache: Path, manifest: Manifest, version: str) -> list[str]:
    """Why Triton, in this process, would not find what the manifest lists; empty if it would find all."""
    now = Manifest.here(version, [target for target in manifest.backends if target in TARGETS], [], [])
    found = []
    if manifest.triton != now.triton:
        both = (f"triton {m.versions['triton']} for Python {m.versions['python']}" for m in (manifest, now))
        found.append("built by {}, here is {}: every kernel will be compiled again".format(*both))
    found += [
        f"{target}: built by another ptxas or backend than there is here"
        if target in now.backends
        else f"{target}: unknown to this version; it knows {', '.join(TARGETS)}"
        for target, backend in manifest.backends.items()
        if backend != now.backends.get(target)
    ]
    if manifest.environment != now.environment:
        found.append(f"built with the environment {manifest.environment}, it is {now.environment} now")
    sources = {kernel.name: kernel.fn.cache_key for kernel in TunedKernel.all()}
    changed = {e.kernel for e in manifest.entries if sources.get(e.kernel) != e.source}
    versions = f"cogvx_fast {manifest.versions['cogvx_fast']} built it, here is {version}"
    found += [f"{name}: the kernel's source has changed since ({versions})" for name in sorted(changed)]
    for one in manifest.entries:
        if reason := _broken(cache / one.folder, one.files):
            found.append(f"{one.kernel} {one.target} {one.configuration}: {reason}")
    return found


def _broken(folder: Path, files: Mapping[str, str]) -> str | None:
    if folder.is_symlink():
        return "a link in the place of its folder"
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        return f"missing: {', '.join(missing)}"
    corrupt = [name for name, digest in files.items() if _sha256(folder / name) != digest]
    if corrupt:
        return f"not as it was built: {', '.join(corrupt)}"
    groups = list(folder.glob(f"{_GROUP}*"))
    if not groups:
        return "missing: triton's list of the files"
    paths = [Path(path) for group in groups for path in _listed(group).values()]
    return "it was moved: triton looks for its files where it was built" if _elsewhere(paths, folder) else None


def relocate(cache: Path, manifest: Manifest) -> dict[Path, str]:
    """New contents for the lists of files of a cache that was moved: triton keeps whole paths in them.

    All of them lie in the cache: a folder that is a link, which may lead out of it, is left as it is.
    """
    changed = {}
    for one in manifest.entries:
        folder = cache / one.folder
        if folder.is_symlink():
            continue
        for group in folder.glob(f"{_GROUP}*"):
            if _elsewhere(map(Path, _listed(group).values()), folder):
                paths = {name: str(folder.resolve() / name) for name in one.files}
                changed[group] = json.dumps({"child_paths": paths})
    return changed


def _listed(group: Path) -> dict[str, str]:
    try:
        listed = json.loads(group.read_text(encoding="utf-8"))["child_paths"]
        return {name: str(path) for name, path in listed.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {"": ""}  # as good as moved


def _elsewhere(paths: Iterable[Path], folder: Path) -> bool:
    return any(path.parent.resolve() != folder.resolve() for path in paths)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
