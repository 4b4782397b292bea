"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from .temporary import discard, sweep, temporary_beside

_MOUNTS = Path("/proc/self/mountinfo")


@contextlib.contextmanager
def complete_or_absent(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, which gets its real name only when the block ends well.

    Missing folders are made. On any exception nothing is left behind, and what was there before stays as it was. What
    processes that were killed left in the folder is removed first.

    Raises:
        OSError: if it cannot be written.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    with _folder_of(path) as keep:
        sweep(path.parent)
        try:
            yield temporary
            if temporary.is_file():
                # Some file systems report that they are full only when the data is flushed.
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
            keep()
        finally:
            discard(temporary)


def write_whole(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all; missing folders are made.

    Raises:
        OSError: if it cannot be written; a file that was there before stays as it was.
    """
    with complete_or_absent(path) as temporary:
        temporary.write_bytes(data)


def try_place(path: str | Path, is_folder: bool = False) -> None:
    """Raise unless `complete_or_absent(path)` can be expected to work; for use before the work. Nothing is left.

    Only trying tells: access rights say nothing of read-only mounts, quotas and pseudo file systems.

    Args:
        is_folder: whether it is to be a folder.

    Raises:
        OSError: as `complete_or_absent` would.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    with _folder_of(path):
        sweep(path.parent)
        try:
            if os.path.lexists(path):
                _try_to_replace(temporary, path, is_folder)
            else:
                _make(temporary, is_folder)
        finally:
            discard(temporary)


@contextlib.contextmanager
def _folder_of(path: Path) -> Iterator[Callable[[], None]]:
    """Make the folders that `path` lies in; those that were missing go again unless the function it gives is called."""
    there = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not there.is_dir():
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
    made = [parent for parent in path.parents if not parent.exists()]  # innermost first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield made.clear
    finally:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()


def _try_to_replace(temporary: Path, path: Path, is_folder: bool) -> None:
    """Try whether what is at `path` may be replaced, and do not."""
    if (path.is_dir() and not path.is_symlink()) != is_folder:
        number = errno.ENOTDIR if is_folder else errno.EISDIR
        raise OSError(number, os.strerror(number), str(path))
    if is_folder and any(path.iterdir()):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
    if _is_mounted(path):
        raise OSError(errno.EBUSY, "something is mounted there", str(path))
    # A folder never takes the place of a file, nor a file that of a folder. That is found out last: after the folder's
    # sticky bit, for one, by which only its owner may replace a file.
    _make(temporary, not is_folder)
    with contextlib.suppress(IsADirectoryError if is_folder else NotADirectoryError):
        os.rename(temporary, path)
        os.rename(path, temporary)  # what was there is gone in the meantime


def _make(path: Path, is_folder: bool) -> None:
    if is_folder:
        path.mkdir()
    else:
        path.touch()


def _is_mounted(path: Path) -> bool:
    """Whether a file system begins at `path`, be it a folder or, as in containers, a file."""
    place = os.path.join(os.path.realpath(path.parent), path.name)
    for letter in "\\ \t\n":
        place = place.replace(letter, f"\\{ord(letter):03o}")
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    return any(line.split(" ")[4] == place for line in lines)
