"""Compiles a C++ file of this package once per machine and loads it.

Libraries are kept in `$XDG_CACHE_HOME/cogvx_kernels` (`~/.cache/cogvx_kernels`) under a name that is a
hash of the source, the headers beside it and here, the flags and the compiler, and appear there whole or not at all.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

_HEADERS = Path(__file__).parent  # that several sources include
COMPILERS = ("g++", "clang++", "c++")
BASE_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp")
# For this CPU. Sums keep the order in which they are written.
ORDERED = (
    "-march=native",
    "-ffp-contract=fast",
    *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []),
)
# Sums may be reordered, which lets them be vectors. Not -ffast-math: linked into a library, it would turn subnormal
# numbers into zeros in the whole process.
REORDERED = (*ORDERED, "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")


class BuildError(RuntimeError):
    """A source could not be compiled here; the message says what is missing."""


def compiler() -> str:
    """The C++ compiler: `$CXX`, or the first of `COMPILERS` that is installed.

    Raises:
        BuildError: where there is none.
    """
    for name in filter(None, (os.environ.get("CXX"), *COMPILERS)):
        path = shutil.which(name)
        if path is not None:
            return path
    raise BuildError(f"no C++ compiler found (looked for $CXX, {', '.join(COMPILERS)})")


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cogvx_kernels"


@functools.cache
def load(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    """The library of `source`, compiled with `BASE_FLAGS` and `flags` unless it is in the cache already.

    Raises:
        BuildError: without a compiler, for one that rejects the source or the flags, or a folder that cannot be
            written.
    """
    command = compiler()
    headers = sorted({*source.parent.glob("*.h"), *_HEADERS.glob("*.h")}, key=lambda path: path.name)
    text = b"\0".join(path.read_bytes() for path in (source, *headers))
    # A compiler that was replaced has another size or time; to ask it for its version would take longer than to load.
    binary = os.stat(os.path.realpath(command))
    identity = (command, str(binary.st_size), str(binary.st_mtime_ns), *BASE_FLAGS, *flags)
    digest = hashlib.sha256(b"\0".join([text, *map(str.encode, identity)]))
    library = cache_folder() / f"{source.stem}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        _compile(command, source, flags, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(f"{library} does not load: {error}") from None


def _compile(command: str, source: Path, flags: tuple[str, ...], library: Path) -> None:
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            partial = Path(folder) / library.name
            result = subprocess.run(
                [command, *BASE_FLAGS, *flags, f"-I{_HEADERS}", "-o", str(partial), str(source)],
                capture_output=True,
                text=True,
                check=False,
            )
            if result.returncode != 0:
                reason = (result.stderr.strip().splitlines() or ["no message"])[0]
                raise BuildError(f"{command} cannot compile {source.name}: {reason}")
            os.replace(partial, library)
    except OSError as error:
        raise BuildError(f"cannot compile {source.name} into {library.parent}: {error}") from None


@dataclass(frozen=True)
class Source:
    """A C++ file, with the flags that it is compiled with."""

    path: Path
    flags: tuple[str, ...]

    @classmethod
    def beside(cls, module: str, name: str, flags: tuple[str, ...]) -> Source:
        """`name` in the folder of `module`, its `__file__`."""
        return cls(Path(module).with_name(name), flags)

    @functools.cache  # noqa: B019 - the sources are constants of their modules
    def library(self) -> ctypes.CDLL:
        """`load` of it."""
        return load(self.path, self.flags)

    def function(self, name: str, dtype: torch.dtype) -> Callable[..., int]:
        """The function `name` for tensors of `dtype`: C has no overloads, so its name ends in the dtype's."""
        return getattr(self.library(), f"{name}_{str(dtype).removeprefix('torch.')}")

    @functools.cache  # noqa: B019 - likewise
    def why_unavailable(self) -> str | None:
        """What keeps this machine from running it, or None. Compiles it, a few seconds, the first time."""
        try:
            self.library()
        except BuildError as error:
            return str(error)
        return None
