"""A video goes through the layers in chunks of frames: their spans, what they share, and where frames wait.

A causal convolution reads the last frames of the chunk before. Of a video of 480x720 all convolutions together keep
2.6 GiB of them in half precision; each is needed once a chunk, so that they may as well lie somewhere slow. Frames that
lie outside of the device's memory are called spilled.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d
from torch import nn

from .. import devices
from ..parallel.bands import Band
from ..plan import VaePlan

BEYOND_MEMORY = 2**60  # bytes that no machine has


@dataclass(frozen=True)
class Spans:
    """First and last (exclusive) frames of each chunk as diffusers has them: the first takes the remainder.

    GroupNorm's statistics are those of a chunk: other chunks would be another video.

    Attributes:
        length: frames of the video.
        size: of a chunk.
    """

    length: int
    size: int

    @property
    def number(self) -> int:
        """How many chunks there are."""
        return max(self.length // self.size, 1)

    def __getitem__(self, index: int) -> tuple[int, int]:
        remainder = self.length % self.size
        first = self.size * index + (remainder if index else 0)
        return first, min(self.size * (index + 1) + remainder, self.length)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return map(self.__getitem__, range(self.number))

    def alike(self) -> Iterator[tuple[tuple[int, int], int]]:
        """Spans, and how many chunks each stands for: the first, the second for all in between, and the last two."""
        number = self.number
        if number <= 4:
            yield from ((span, 1) for span in self)
            return
        yield self[0], 1
        yield self[1], number - 3
        yield self[number - 2], 1
        yield self[number - 1], 1


def run_chunks(
    frames: torch.Tensor, size: int, state: ChunkState, run: Callable[[torch.Tensor, ChunkState], torch.Tensor]
) -> Iterator[torch.Tensor]:
    """`run` of each chunk in turn, without gradients."""
    for first, last in Spans(frames.shape[2], size):
        state.is_last = last == frames.shape[2]
        # Not around the yield: whoever takes the chunks has modes of their own. And none of these reaches the layers: a
        # chunk may be asked for in another mode than the last.
        plain = torch.autocast(frames.device.type, enabled=False)
        with devices.current(frames.device), torch.inference_mode(False), torch.no_grad(), plain:
            chunk = run(frames[:, :, first:last], state)
        yield chunk
        del chunk


@dataclass(frozen=True)
class SlicingPlan:
    """How the layers are sliced so that their tensors fit a budget, and the memory that they take then.

    Attributes:
        peak: bytes alive at the worst moment.
        layer: which layer that moment is in.
        rows: of a convolution computed at a time, where that is not all of them.
        frames_at_once: frames upsampled at a time, likewise.
        spilled: layers whose waiting frames (a convolution's last ones, an upsampling's input, the pixels) are spilled.
        unpacked: convolutions for whose weights, in an order of our own, the budget has no room: torch's runs.
        spilled_bytes: the most that is spilled at once.
        spilled_to: where that lies, in words.
    """

    peak: int = 0
    layer: str = ""
    rows: Mapping[nn.Module, int] = field(default_factory=dict, repr=False)
    frames_at_once: Mapping[nn.Module, int] = field(default_factory=dict, repr=False)
    spilled: Container[nn.Module] = field(default=frozenset(), repr=False)
    unpacked: frozenset[nn.Module] = field(default=frozenset(), repr=False)
    spilled_bytes: int = 0
    spilled_to: str = ""

    def __str__(self) -> str:
        sliced = f", {len(self.rows)} convolutions in slices of rows" if self.rows else ""
        spilled = f", {size_in_words(self.spilled_bytes)} in {self.spilled_to}" if self.spilled_bytes else ""
        unpacked = f", {len(self.unpacked)} of them torch's for lack of room" if self.unpacked else ""
        return f"peak {size_in_words(self.peak)} in {self.layer}{sliced}{unpacked}{spilled}"


def size_in_words(size: int) -> str:
    """A number of bytes as MiB or GiB."""
    if size >= BEYOND_MEMORY:  # a division would give numbers too long to read, or none
        return "more than 2^60 bytes"
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


@dataclass
class ChunkState:
    """What the layers know and keep while the chunks of one video go through them.

    Attributes:
        plan: who computes.
        slicing: how many rows at a time.
        band: the rows of the frames that are this process's; None: all.
        conv_cache: of each causal convolution the last frames that it read.
        border_cache: likewise of the rows above the band and below it, which are its neighbours'.
        is_last: whether no chunk follows this one: nothing is cached then.
    """

    plan: VaePlan
    slicing: SlicingPlan = field(default_factory=SlicingPlan)
    band: Band | None = None
    conv_cache: dict[nn.Module, FrameStore] = field(default_factory=dict)
    border_cache: dict[nn.Module, tuple[torch.Tensor | None, ...]] = field(default_factory=dict)
    is_last: bool = False
    _frames: torch.Tensor | None = None

    def put(self, frames: torch.Tensor) -> None:
        """Leave frames for the next layer. The caller should hold them no longer."""
        self._frames = frames

    def take(self) -> torch.Tensor:
        """The frames that the layer before has left. Whoever takes them has the only reference, so that their memory
        is free as soon as they are used: at the network's peak they are half of it."""
        frames, self._frames = self._frames, None
        assert frames is not None, "no layer has left frames"
        return frames

    def is_sliced(self, layer: CogVideoXCausalConv3d, height: int) -> bool:
        """Whether a convolution of frames of `height` is computed some rows at a time."""
        return self.slicing.rows.get(layer, height) < height


class FrameStore(Protocol):
    """Frames `(batch, time, height, width, channels)`, written and read some rows at a time."""

    def write(self, first: int, rows: torch.Tensor) -> None:
        """Put `rows` in the place of those from `first` on."""

    def read(self, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` (exclusive), on any device."""


def allocate_frames(shape: tuple[int, ...], like: torch.Tensor, spilled: bool) -> FrameStore:
    """Room for frames of `shape` with the dtype of `like`.

    Args:
        spilled: not in the memory of the device of `like`: for a CPU in a temporary file that has no name (in the
            folder that `TMPDIR` names), for a GPU in the host's pinned memory.

    Raises:
        OSError: if there is no room for the file.
    """
    if not spilled:
        return FramesInMemory(like.new_empty(shape))
    if like.device.type == "cpu":
        return FramesInFile(shape, like.dtype)
    return FramesInMemory(torch.empty(shape, dtype=like.dtype, device="cpu", pin_memory=like.device.type == "cuda"))


def spill_target(device: torch.device) -> str:
    """Where spilled frames of `device` lie, in words."""
    return f"a temporary file in {tempfile.gettempdir()}" if device.type == "cpu" else "the host's memory"


class FramesInMemory:
    """Frames that wait in a tensor."""

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
    """Frames that wait in a file, which is gone when the object is, or the process.

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
        rows = torch.empty((batch, time, last - first, width, channels), dtype=self._dtype, device="cpu")
        for place, (sample, t) in self._places(first):
            os.preadv(self._file.fileno(), [_bytes_of(rows[sample, t])], place)
        return rows

    def _places(self, first: int) -> Iterator[tuple[int, tuple[int, int]]]:
        for number, frame in enumerate(itertools.product(range(self._shape[0]), range(self._shape[1]))):
            yield (number * self._height + first) * self._row, frame


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data
