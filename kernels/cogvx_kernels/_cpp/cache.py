"""Where compiled libraries are kept, and which of them may be loaded.

They are in `$XDG_CACHE_HOME/cogvx_kernels` (`~/.cache/cogvx_kernels`), or where that cannot be, in a folder of the
user's among the temporary ones. To load a library that was cut, or that somebody else wrote, would end the process or
run their code. So a library's name ends in the digest of its bytes, and it is loaded if that is so, and if it and its
folder belong to this user and nobody else can write to them. It appears whole or not at all.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_NAME = "cogvx_kernels"
_STALE = 3600.0  # seconds; no build takes that long, see `build.LIMIT`
_LOGGER = logging.getLogger("cogvx_kernels")


def find(prefix: str) -> Path | None:
    """The newest library whose name starts with `prefix` and that may be loaded."""
    return next((path for path, problem in _stored(prefix) if problem is None), None)


def refused(prefix: str) -> list[str]:
    """Why what is stored under `prefix` may not be loaded, in words."""
    return [problem for _, problem in _stored(prefix) if problem is not None]


def keep(prefix: str, make: Callable[[Path], None]) -> Path:
    """The library that `make` writes to the path it is given, stored under `prefix`.

    Raises:
        OSError: where no folder can be written, not even a temporary one.
    """
    folder, problem = where()
    try:
        library = _keep_in(folder, prefix, make)
    except OSError as error:
        if problem is not None:
            raise
        folder, problem = _temporary(), f"{folder} cannot be written: {error.strerror or error}"
        library = _keep_in(folder, prefix, make)
    if problem is not None:
        _say(f"compiled C++ is kept in {folder}: {problem}; XDG_CACHE_HOME names another place")
    return library


def where() -> tuple[Path, str | None]:
    """The folder in which new libraries are kept, and if it is a temporary one, why.

    Raises:
        OSError: where not even a temporary one can be made.
    """
    home = _home()
    problem = "there is no home folder" if home is None else _prepare(home)
    return (home, None) if home is not None and problem is None else (_temporary(), problem)


def _home() -> Path | None:
    """`$XDG_CACHE_HOME` and `$HOME` count if they are absolute: else it would be another folder in each."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():
        try:
            cache = Path.home() / ".cache"
        except RuntimeError:  # no $HOME, and a user without an entry among the system's
            return None
    return cache / _NAME if cache.is_absolute() else None


def _shared() -> Path | None:
    """The temporary folder that all processes of this user find again."""
    try:
        return Path(tempfile.gettempdir()) / f"{_NAME}-{os.geteuid()}"
    except FileNotFoundError:
        return None


@functools.cache
def _temporary() -> Path:
    """`_shared`, or one of this process's own if somebody took that name."""
    folder = _shared()
    if folder is None or _prepare(folder) is not None:
        folder = Path(tempfile.mkdtemp(prefix=f"{_NAME}-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _prepare(folder: Path) -> str | None:
    """Makes it. What keeps libraries from being written there, or None."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _tighten(folder)
    except OSError as error:
        return f"{folder} cannot be made: {error.strerror}"
    if (problem := _why_unsafe(folder)) is not None:
        return problem
    return None if os.access(folder, os.W_OK | os.X_OK) else f"{folder} cannot be written"


def _tighten(folder: Path) -> None:
    """Takes from a folder of this user's the group's right to write, which a umask of 002 gave it."""
    status, others = folder.stat(), stat.S_IWGRP | stat.S_IWOTH
    if folder != _shared() and status.st_uid == os.geteuid() and status.st_mode & others == stat.S_IWGRP:
        folder.chmod(stat.S_IMODE(status.st_mode) & ~others)


def _why_unsafe(folder: Path) -> str | None:
    """What would let somebody else put a library into it, or None."""
    try:
        # A link in the user's cache is the user's; one among the temporary files may be anybody's.
        status = os.stat(folder, follow_symlinks=folder != _shared())
    except OSError as error:
        return f"{folder} cannot be read: {error.strerror}"
    return _why_others(folder, status) if stat.S_ISDIR(status.st_mode) else f"{folder} is not a folder"


def _why_others(path: Path, status: os.stat_result) -> str | None:
    if status.st_uid != os.geteuid():
        return f"{path} belongs to another user ({status.st_uid})"
    writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return f"{path} can be written by other users (mode {stat.S_IMODE(status.st_mode):o})" if writable else None


def _stored(prefix: str) -> Iterator[tuple[Path, str | None]]:
    """The libraries under `prefix`, newest first, each with what keeps it from being loaded."""
    for folder in filter(None, (_home(), _shared())):
        libraries = _named(folder, prefix)
        if libraries and (problem := _why_unsafe(folder)) is not None:
            yield folder, problem
            continue
        for library in libraries:
            yield library, _why_unfit(library)


def _named(folder: Path, prefix: str) -> list[Path]:
    with contextlib.suppress(OSError):  # it may be out of this user's reach
        return sorted(folder.glob(f"{prefix}-*.so"), key=_written, reverse=True)
    return []


def _written(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _why_unfit(library: Path) -> str | None:
    try:
        with open(os.open(library, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return f"{library} is not a file"
            if (problem := _why_others(library, status)) is not None:
                return problem
            intact = _digest(file.read()) == library.stem.rpartition("-")[2]
    except OSError as error:
        return f"{library} cannot be read: {error.strerror}"
    return None if intact else f"{library} is damaged"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _keep_in(folder: Path, prefix: str, make: Callable[[Path], None]) -> Path:
    _remove_stale(folder)
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder, ignore_cleanup_errors=True) as build:
        partial = Path(build) / "library.so"
        make(partial)
        partial.chmod(0o700)
        library = folder / f"{prefix}-{_digest(partial.read_bytes())}.so"
        _sync(partial)  # else a name may be on the disk before what it names
        if _why_unfit(library) is not None:  # else another process made it, and may have it in memory
            os.replace(partial, library)
    with contextlib.suppress(OSError):  # some file systems do not do this for folders
        _sync(folder)
    return library


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_stale(folder: Path) -> None:
    """What builds left that were killed; a process that builds now has a newer one."""
    for pattern in ("build-*", "tmp*"):
        for build in folder.glob(pattern):
            if build.is_dir() and 0 < _written(build) < time.time() - _STALE:
                shutil.rmtree(build, ignore_errors=True)


@functools.cache
def _say(message: str) -> None:
    """Once a process."""
    _LOGGER.warning(message)
