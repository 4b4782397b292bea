"""Frames that are put away until they are needed again: in the device's memory, or where a budget does not count them.

A causal convolution reads the last frames of the chunk before. Of a video of 480x720 all convolutions together keep
2.6 GiB of them in half precision; each is needed once a chunk, so that they may as well lie somewhere slow.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from typing import Protocol

import torch


class KeptFrames(Protocol):
    """Frames `(batch, time, height, width, channels)`, written and read some rows at a time."""

    def write(self, first: int, rows: torch.Tensor) -> None:
        """Put `rows` in the place of those from `first` on."""

    def read(self, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` (exclusive), on any device."""


def keep(shape: tuple[int, ...], like: torch.Tensor, elsewhere: bool) -> KeptFrames:
    """Room for frames of `shape` with the dtype of `like`.

    Args:
        elsewhere: not in the memory of the device of `like`: for a CPU in a temporary file that has no name (in the
            folder that `TMPDIR` names), for a GPU in the host's pinned memory.

    Raises:
        OSError: if there is no room for the file.
    """
    if not elsewhere:
        return FramesInMemory(like.new_empty(shape))
    if like.device.type == "cpu":
        return FramesInFile(shape, like.dtype)
    return FramesInMemory(torch.empty(shape, dtype=like.dtype, pin_memory=like.device.type == "cuda"))


def place_of(device: torch.device) -> str:
    """Where `keep(..., elsewhere=True)` puts frames of `device`, in words."""
    return f"a temporary file in {tempfile.gettempdir()}" if device.type == "cpu" else "the host's memory"


class FramesInMemory:
    """In a tensor."""

    def __init__(self, tensor: torch.Tensor):
        self._tensor = tensor

    def write(self, first: int, rows: torch.Tensor) -> None:
        place = self._tensor[:, :, first : first + rows.shape[2]]
        # Frame by frame: rows of several have gaps between them, and between devices gaps cost a copy.
        for sample in range(rows.shape[0]):
            for t in range(rows.shape[1]):
                place[sample, t] = rows[sample, t]

    def read(self, first: int, last: int) -> torch.Tensor:
        return self._tensor[:, :, first:last]


class FramesInFile:
    """In a file that is gone when the object is, or the process.

    It is written to and read from, and not mapped: what a process has mapped counts as its memory.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        self._shape, self._dtype = shape, dtype
        _, _, self._height, width, channels = shape
        self._row = width * channels * dtype.itemsize
        size = shape[0] * shape[1] * self._height * self._row
        self._file = tempfile.TemporaryFile(prefix="cogvx-")  # noqa: SIM115 - closed when the object goes
        try:
            os.posix_fallocate(self._file.fileno(), 0, size)  # a full disk is told now, not in the middle
        except OSError as error:
            self._file.close()
            raise OSError(
                error.errno,
                f"no room for {size / 2**20:.0f} MiB of frames in {tempfile.gettempdir()}, where a memory budget as"
                " small as this one puts them; let TMPDIR name another folder, or raise EngineConfig.vae_memory",
            ) from error

    def write(self, first: int, rows: torch.Tensor) -> None:
        for place, (sample, t) in self._places(first):
            os.pwrite(self._file.fileno(), _bytes_of(rows[sample, t].contiguous()), place)

    def read(self, first: int, last: int) -> torch.Tensor:
        batch, time, _, width, channels = self._shape
        rows = torch.empty((batch, time, last - first, width, channels), dtype=self._dtype)
        for place, (sample, t) in self._places(first):
            os.preadv(self._file.fileno(), [_bytes_of(rows[sample, t])], place)
        return rows

    def _places(self, first: int) -> Iterator[tuple[int, tuple[int, int]]]:
        for number, frame in enumerate(itertools.product(range(self._shape[0]), range(self._shape[1]))):
            yield (number * self._height + first) * self._row, frame


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data
