"""Compiles a C++ file of this package once for each kind of CPU and loads it.

Libraries are kept, see `cache`, under a hash of the source, the headers beside it and here, the flags and the CPU, and
one of the compiler. Where that is gone or fails, what another compiler made of the same is taken.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import platform
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from . import cache, native

_HEADERS = Path(__file__).parent  # that several sources include
COMPILERS = ("g++", "clang++", "c++")
LIMIT = 120.0  # seconds for one source; the largest takes two
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


@functools.cache
def load(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    """The library of `source`, compiled with `BASE_FLAGS` and `flags` unless it is in the cache already.

    Raises:
        BuildError: without a compiler, for one that hangs or rejects the source or the flags, where no folder can be
            written, or for a library that does not load, nor when it is compiled again.
    """
    try:
        command, missing = compiler(), None
    except BuildError as error:
        command, missing = None, error
    key = f"{source.stem}-{_key(source, flags, command)}"
    if command is None:
        return _open(_other(key, missing))
    own = f"{key}-{_version(command)}"
    library = cache.find(own)
    if library is not None:
        with contextlib.suppress(BuildError):
            return _open(library)
    try:
        library = cache.keep(own, functools.partial(_compile, command, source, flags))
    except BuildError as error:
        library = _other(key, error)
    except OSError as error:
        raise BuildError(f"cannot compile {source.name}: no folder can be written: {error}") from None
    return _open(library)


def _key(source: Path, flags: tuple[str, ...], command: str | None) -> str:
    headers = sorted({*source.parent.glob("*.h"), *_HEADERS.glob("*.h")}, key=lambda path: path.name)
    cpu = native.cpu() or (None if command is None else native.resolved(command))
    if cpu is None:
        raise BuildError("it cannot be told which CPU this is: neither /proc/cpuinfo nor a C++ compiler says")
    text = (path.read_bytes() for path in (source, *headers))
    return _hash(*text, *map(str.encode, (platform.machine(), cpu, *BASE_FLAGS, *flags)))


def _version(command: str) -> str:
    """A compiler that was replaced has another size or time; to ask it would take longer than to load."""
    try:
        binary = os.stat(os.path.realpath(command))
    except OSError as error:
        raise BuildError(f"{command} cannot be read: {error.strerror}") from None
    return _hash(f"{command}\0{binary.st_size}\0{binary.st_mtime_ns}".encode())


def _hash(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _other(key: str, error: BuildError | None) -> Path:
    """What another compiler made, in the place of one whose compilation ended in `error`."""
    if (library := cache.find(key)) is not None:
        return library
    reasons = cache.refused(key)
    name = key.rpartition("-")[0]
    if not reasons and cache.find(name) is not None:
        reasons = [f"what is kept of {name} is for another CPU or version"]
    raise BuildError("; ".join([str(error), *reasons])) from None


def _open(library: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(f"{library} does not load: {error}") from None


def _compile(command: str, source: Path, flags: tuple[str, ...], output: Path) -> None:
    """
    Raises:
        BuildError: where it fails.
        OSError: where there is no room.
    """
    errors = _run(command, *BASE_FLAGS, *flags, f"-I{_HEADERS}", "-o", str(output), str(source))
    for code in (errno.ENOSPC, errno.EDQUOT):
        if errors is not None and os.strerror(code) in errors:
            raise OSError(code, os.strerror(code))
    if errors is not None or not output.exists():
        reason = ((errors or "").strip().splitlines() or ["no message"])[0]
        raise BuildError(f"{command} cannot compile {source.name}: {reason}")


_slow: set[str] = set()  # compilers that were stopped: what they are asked next would only wait as long


def _run(command: str, *arguments: str) -> str | None:
    """What it said if it failed; None if it did not."""
    too_slow = BuildError(f"{command} did not finish in {LIMIT:.0f} s")
    if command in _slow:
        raise too_slow
    try:
        process = subprocess.Popen(
            [command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "LC_ALL": "C"},
            text=True,
            errors="replace",
            process_group=0,  # a compiler starts others, which are stopped with it
        )
    except OSError as error:
        raise BuildError(f"{command} cannot be run: {error.strerror}") from None
    with process:
        try:
            _, errors = process.communicate(timeout=LIMIT)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            _slow.add(command)
            raise too_slow from None
    return errors if process.returncode else None


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
