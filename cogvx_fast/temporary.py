"""Temporary names that say whose they are: what a killed process left is told from what is being written."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import shutil
import uuid
from pathlib import Path

_PROC = Path("/proc")
_NAME = re.compile(r"\.cogvx-[0-9a-f]{8}-[0-9]{1,10}-[0-9]{1,20}-[0-9a-f]{8}\.partial")


def temporary_beside(path: Path) -> Path:
    """A name in the folder of `path` that is free, and that `sweep` takes for this process's own."""
    pid = os.getpid()
    return path.with_name(f".cogvx-{_where()}-{pid}-{_start(pid) or 0}-{uuid.uuid4().hex[:8]}.partial")


def is_temporary(path: Path) -> bool:
    """Whether the name of `path` is of the form that `temporary_beside` gives."""
    return _NAME.fullmatch(path.name) is not None


def sweep(folder: Path) -> None:
    """Remove from `folder` the temporary files and folders of processes that are gone.

    Only what is this user's own, has our form of a name and was made where its process would be seen: another
    machine or container that writes into the folder may be at work.
    """
    paths: list[Path] = []
    with contextlib.suppress(OSError):  # no such folder, or none that may be read: nothing to sweep in it
        paths = [path for path in folder.iterdir() if is_temporary(path)]
    for path in paths if _sees_processes() else ():
        where, pid, start = path.name.split("-")[1:4]
        if where != _where() or _start(int(pid)) == start:
            continue
        with contextlib.suppress(OSError):  # another swept it
            if path.lstat().st_uid == os.geteuid() and not path.is_symlink():
                discard(path)


def discard(path: Path) -> None:
    """Remove a file or folder that may not be there, as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _start(pid: int) -> str | None:
    """When a process started, in ticks of the machine's clock; None: there is none of that number, or it has ended.

    Numbers are used again, but not with the same start.
    """
    try:
        fields = (_PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else fields[19].decode()  # ended, and nobody has asked how


def _sees_processes() -> bool:
    return _start(os.getpid()) is not None


@functools.cache
def _where() -> str:
    """Stands for the machine, and the container on it, within which the numbers of processes are unique."""
    words = [platform.node()]
    with contextlib.suppress(OSError):
        words.append(os.readlink(_PROC / "self" / "ns" / "pid"))
    with contextlib.suppress(OSError):
        words.append(Path("/etc/machine-id").read_text(encoding="ascii", errors="replace"))
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:8]
