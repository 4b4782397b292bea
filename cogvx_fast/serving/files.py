"""The files of jobs, in a folder or wherever fsspec reaches: whole under their names, or not there."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec.core

from cogvx_fast.temporary import discard, is_temporary, sweep, temporary_beside

from .jobs import StorageFullError

VIDEO, PARKED, PREVIEW, REFERENCE = "video.mp4", "parked.safetensors", "preview.webp", "reference"
_PIECE = 2**20  # bytes
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Files:
    """A folder for each job, named by its id.

    Args:
        url: of fsspec, such as `s3://bucket/videos`, or the path of a folder.
        least_free: bytes that are to stay free on the disk of a folder.

    Raises:
        ValueError: for a place that fsspec does not reach.
    """

    def __init__(self, url: str, least_free: int = 0) -> None:
        try:
            self._system, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"files {url!r} cannot be reached ({error}); must be a folder or a URL of fsspec"
            ) from error
        protocol = self._system.protocol
        is_local = "file" in (protocol if isinstance(protocol, tuple | list) else (protocol,))
        self._folder = Path(self._root) if is_local else None
        self._least_free = least_free
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            sweep(self._folder)

    def check_room(self) -> None:
        """Raise a `StorageFullError` where less than `least_free` bytes are left; what is no folder does not say."""
        if self._folder is not None and shutil.disk_usage(self._folder).free < self._least_free:
            raise StorageFullError(f"less than {self._least_free / 2**20:.0f} MiB are free for videos")

    def write(self, job_id: str, name: str, write: Callable[[Path], Any]) -> int:
        """Make a file of a job by `write`, which is given a path with that name; returns its size in bytes.

        Raises:
            StorageFullError: if there is no room; nothing is left of it.
        """
        try:
            with self._scratch() as folder:
                path = folder / name
                write(path)
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
                size = path.stat().st_size
                self._move(path, job_id, name)
                return size
        except OSError as error:
            if error.errno in _FULL:
                raise StorageFullError(f"there is no room for {name} ({error.strerror})") from error
            raise

    def _move(self, path: Path, job_id: str, name: str) -> None:
        if self._folder is not None:
            target = self._folder / job_id
            while True:
                # Not `exist_ok`, which looks again whether it is there, and raises if it went meanwhile.
                with contextlib.suppress(FileExistsError):
                    target.mkdir()
                try:
                    os.replace(path, target / name)
                    break
                except FileNotFoundError:  # the folder went again: the job's owner deletes it at this moment
                    if not path.exists():
                        raise
            with contextlib.suppress(FileNotFoundError):
                _sync(target)
            return
        target_name = f"{self._root}/{job_id}/{name}"
        temporary = f"{self._root}/{job_id}/.{name}-{uuid.uuid4().hex[:8]}"
        self._system.makedirs(f"{self._root}/{job_id}", exist_ok=True)
        try:
            self._system.put_file(str(path), temporary)
            self._system.mv(temporary, target_name)
        except BaseException:
            with contextlib.suppress(Exception):  # what went wrong is what counts
                self._system.rm_file(temporary)
            raise

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[Path]:
        """A folder for a file that is not whole yet, on the same disk where that is known."""
        if self._folder is None:
            with tempfile.TemporaryDirectory() as folder:
                yield Path(folder)
            return
        temporary = temporary_beside(self._folder / "writing")
        temporary.mkdir()
        try:
            yield temporary
        finally:
            discard(temporary)

    @contextlib.contextmanager
    def local(self, job_id: str, name: str) -> Iterator[Path]:
        """A path at which a file of a job can be read within the block.

        Raises:
            FileNotFoundError: if there is none.
        """
        if self._folder is not None:
            path = self._folder / job_id / name
            if not path.is_file():
                raise FileNotFoundError(f"{job_id} has no {name}")
            yield path
            return
        with self._scratch() as folder:
            self._system.get_file(f"{self._root}/{job_id}/{name}", str(folder / name))
            yield folder / name

    def size(self, job_id: str, name: str) -> int | None:
        """The size of a job's file in bytes; None: there is none."""
        try:
            return int(self._system.info(f"{self._root}/{job_id}/{name}")["size"])
        except FileNotFoundError:
            return None

    def sizes(self, job_id: str) -> int:
        """The sizes of all files of a job, in bytes."""
        try:
            return sum(int(entry["size"] or 0) for entry in self._system.ls(f"{self._root}/{job_id}", detail=True))
        except FileNotFoundError:
            return 0

    def pieces(self, job_id: str, name: str, start: int, end: int) -> Iterator[bytes]:
        """The bytes of a file from `start` up to, without, `end`."""
        with cast("BinaryIO", self._system.open(f"{self._root}/{job_id}/{name}", "rb")) as file:
            file.seek(start)
            while start < end and (piece := file.read(min(_PIECE, end - start))):
                start += len(piece)
                yield piece

    def remove(self, job_id: str, *names: str) -> None:
        """Remove files of a job, those that there are; without names all of them.

        A worker that has not heard yet may write one meanwhile: it removes that, or `Retention` does.
        """
        places = [f"{job_id}/{name}" for name in names] or [job_id]
        for place in places:
            if self._folder is not None:
                discard(self._folder / place)
                continue
            with contextlib.suppress(FileNotFoundError):
                self._system.rm(f"{self._root}/{place}", recursive=not names)

    def job_ids(self) -> set[str]:
        """The ids of the jobs that have files."""
        self._system.invalidate_cache()
        paths = (Path(entry["name"]) for entry in self._system.ls(self._root, detail=True))
        return {path.name for path in paths if not is_temporary(path)}


def _sync(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
