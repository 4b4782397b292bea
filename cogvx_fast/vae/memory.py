"""What the layers will allocate, known before they run: the peak, and rows at a time that keep it within a budget.

The ledger goes through the layers as `decode_chunk` and `encode_chunk` do and counts every tensor of frames while it
is alive: the frames themselves, a convolution's padded input and output, the causal frames kept for the next chunk
and the norms' tables. Weights, the caller's latents or pixels, and what a convolution library takes for itself are
not in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from diffusers import AutoencoderKLCogVideoX
from torch import nn

from .resampling import copies, pooled_frames

# A convolution's input and output beyond this are computed some rows at a time even without a budget: it costs no time.
WORKSPACE = 512 * 2**20


@dataclass(frozen=True)
class MemoryPlan:
    """How the layers run and what that takes.

    Attributes:
        peak: bytes alive at the worst moment.
        layer: which layer that moment is in.
        rows: of a convolution computed at a time, where that is not all of them.
        frames_at_once: frames upsampled at a time, likewise.
    """

    peak: int
    layer: str
    rows: dict[nn.Module, int] = field(repr=False)
    frames_at_once: dict[nn.Module, int] = field(repr=False)

    def __str__(self) -> str:
        sliced = f", {len(self.rows)} convolutions in slices of rows" if self.rows else ""
        return f"peak {size_in_words(self.peak)} in {self.layer}{sliced}"


def size_in_words(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def plan_decode(
    vae: AutoencoderKLCogVideoX,
    shape: tuple[int, ...],
    spans: list[tuple[int, int]],
    impl: str,
    itemsize: int,
    budget: int | None = None,
    keeps_output: bool = True,
) -> MemoryPlan:
    """The plan for decoding latents of `shape` `(batch, channels, time, height, width)` in chunks of `spans`.

    Args:
        impl: of the operations between convolutions.
        itemsize: bytes of a number of the model's dtype.
        budget: bytes that the peak may have; None: what costs no time.
        keeps_output: whether the pixels of all chunks are joined at the end (not so in a stream).

    Raises:
        ValueError: if the budget is below the smallest that works, which is named.
    """
    return _plan(_Decoder, vae, shape, spans, impl, itemsize, budget, keeps_output)


def plan_encode(
    vae: AutoencoderKLCogVideoX,
    shape: tuple[int, ...],
    spans: list[tuple[int, int]],
    impl: str,
    itemsize: int,
    budget: int | None = None,
) -> MemoryPlan:
    """The same for encoding pixels of `shape` `(batch, channels, frames, height, width)`."""
    return _plan(_Encoder, vae, shape, spans, impl, itemsize, budget, True)


def _plan(
    kind: type[_Ledger],
    vae: AutoencoderKLCogVideoX,
    shape: tuple[int, ...],
    spans: list[tuple[int, int]],
    impl: str,
    itemsize: int,
    budget: int | None,
    keeps_output: bool,
) -> MemoryPlan:
    def run(budget: int | None, fixed: _Ledger | None = None) -> _Ledger:
        ledger = kind(impl, itemsize, budget, fixed)
        ledger.run(vae, shape, spans, keeps_output)
        return ledger

    # First what each layer may take in the worst of the chunks, then what that comes to.
    ledger = run(budget, fixed=run(budget))
    if budget is not None and ledger.peak > budget:
        smallest = run(0, fixed=run(0))
        if smallest.peak > budget:
            raise ValueError(
                f"a budget of {size_in_words(budget)} is too small for {_in_words(shape)}: the smallest possible is"
                f" {size_in_words(smallest.peak)} ({smallest.peak} bytes), for {smallest.layer(vae)}; fewer rows,"
                " columns or samples at once take less"
            )
        ledger = smallest
    return MemoryPlan(ledger.peak, ledger.layer(vae), ledger.rows, ledger.frames_at_once)


def _in_words(shape: tuple[int, ...]) -> str:
    batch, _, time, height, width = shape
    return f"{batch} x {time} x {height} x {width} (batch, time, height, width)"


class _Ledger:
    """Counts what is alive. Layers that can be sliced take as many rows as leave the peak within the budget."""

    def __init__(self, impl: str, itemsize: int, budget: int | None, fixed: _Ledger | None):
        # What the torch implementation holds on the way of a number that it writes: both tables', the sum and its SiLU
        # in fp32; of half precision also the number in fp32 and the result.
        self.filling = 0 if impl != "torch" else 16 if itemsize == 4 else 20 + itemsize
        self.wide = 0 if impl != "torch" or itemsize == 4 else 4  # a frame in fp32, for its statistics
        self.itemsize, self.budget, self.fixed = itemsize, budget, fixed
        self.rows: dict[nn.Module, int] = {}
        self.frames_at_once: dict[nn.Module, int] = {}
        self.caches: dict[nn.Module, int] = {}
        self.live = self.peak = 0
        self.worst: nn.Module | None = None
        self.is_last = False

    def layer(self, vae: nn.Module) -> str:
        return next((name for name, module in vae.named_modules() if module is self.worst), "the joined result")

    def run(
        self, vae: AutoencoderKLCogVideoX, shape: tuple[int, ...], spans: list[tuple[int, int]], keeps_output: bool
    ) -> None:
        batch, channels, _, height, width = shape
        outputs = 0
        for number, (first, last) in enumerate(spans):
            self.is_last = number == len(spans) - 1
            chunk = self.chunk(vae, (batch, last - first, height, width, channels))
            if keeps_output:
                outputs += chunk
            else:
                self.live -= chunk
        self.reach(None, outputs if len(spans) > 1 else 0)

    def chunk(self, vae: AutoencoderKLCogVideoX, frames: tuple[int, ...]) -> int:
        """Goes through one chunk; returns the bytes of its result, which is alive then."""
        raise NotImplementedError

    def size(self, frames: Iterable[int]) -> int:
        return math.prod(frames) * self.itemsize

    def reach(self, layer: nn.Module | None, extra: int) -> None:
        if self.live + extra > self.peak:
            self.peak, self.worst = self.live + extra, layer

    def causal_conv(
        self, layer: nn.Module, frames: tuple[int, ...], norm: tuple[int, ...] | None = None, adds: bool = False
    ) -> tuple[int, ...]:
        """A causal convolution of `frames`, which stay alive; so do those that it makes, unless it adds to others.

        norm: shape of the tables of the norm before it, None where there is none.
        """
        batch, time, height, width, channels = frames
        out = (batch, time, height, width, layer.conv.out_channels)
        kernel = layer.time_kernel_size
        held = filling = taken = 0
        if norm is not None:
            table = math.prod(norm) * 4
            self.reach(layer, table * 4 + table // 4 * self.itemsize * 2)  # while they are made
            self.reach(layer, batch * height * width * channels * self.wide)
            held, filling = 2 * table, self.filling
            taken = 4 * norm[3] if filling else 0  # rows of a table, of which its columns are taken
        old = self.caches.pop(layer, 0)
        if not self.is_last:
            self.caches[layer] = old or self.size((batch, kernel - 1, height, width, channels))
            self.live += self.caches[layer] - old

        def workspace(rows: int) -> int:
            buffer = self.size((batch, kernel - 1 + time, rows + 2, width, channels))
            on_the_way = batch * min(rows + 2, height) * channels * (width * filling + taken)
            return buffer + max(on_the_way, self.size((batch, time, rows, width, out[4])))

        whole = 0 if adds else self.size(out)
        rows = self._most(layer, self.rows, height, workspace, held, whole)
        # In slices the result is there beside the slice; in one, the slice is the result.
        self.reach(layer, held + workspace(rows) + (whole if rows < height else 0))
        if self.is_last:
            self.live -= old
        self.live += whole
        return out

    def _most(self, layer: nn.Module, chosen: dict, most: int, workspace: object, held: int, whole: int) -> int:
        """As many rows (or frames) at a time as fit; the fewest that any chunk could take."""
        if self.fixed is not None:
            number = getattr(self.fixed, "rows" if chosen is self.rows else "frames_at_once").get(layer, most)
            number = min(number, most)
        elif self.budget is None:
            number = most if workspace(most) <= WORKSPACE else _largest(most - 1, workspace, WORKSPACE)
        elif self.live + held + workspace(most) <= self.budget:
            number = most
        else:
            number = _largest(most - 1, workspace, self.budget - self.live - held - whole)
        if number < most:
            chosen[layer] = min(number, chosen.get(layer, number))
        return number

    def resnets(self, blocks: Iterable[nn.Module], frames: tuple[int, ...], norm: tuple[int, ...]) -> tuple[int, ...]:
        for block in blocks:
            table = (*norm, frames[4])
            hidden = self.causal_conv(block.conv1, frames, table)
            if block.in_channels != block.out_channels:
                if block.use_conv_shortcut:
                    self.causal_conv(block.conv_shortcut, frames)
                else:
                    self.live += self.size(hidden)
                    self.reach(block, 0)
                self.live -= self.size(frames)
                frames = hidden
            self.causal_conv(block.conv2, hidden, (*norm, hidden[4]), adds=True)
            self.live -= self.size(hidden)
        return frames


def _largest(most: int, workspace: object, limit: int) -> int:
    """The largest number up to `most` whose workspace is within `limit`, at least 1; workspaces grow evenly."""
    each = workspace(2) - workspace(1)
    return max(1, min(most, 1 + (limit - workspace(1)) // max(each, 1)))


class _Decoder(_Ledger):
    def chunk(self, vae: AutoencoderKLCogVideoX, frames: tuple[int, ...]) -> int:
        decoder, latents = vae.decoder, self.size(frames)
        norm = frames[:4]
        self.live += latents
        frames = self.causal_conv(decoder.conv_in, frames)
        frames = self.resnets(decoder.mid_block.resnets, frames, norm)
        for block in decoder.up_blocks:
            frames = self.resnets(block.resnets, frames, norm)
            for layer in block.upsamplers or ():
                frames = self.upsample(layer, frames)
        before = self.size(frames)
        frames = self.causal_conv(decoder.conv_out, frames, (*norm, frames[4]))
        self.live -= before + latents
        self.reach(decoder.conv_out, self.size(frames))  # turned to channels first
        return self.size(frames)

    def upsample(self, layer: nn.Module, frames: tuple[int, ...]) -> tuple[int, ...]:
        batch, time, height, width, channels = frames
        out_channels = layer.conv.out_channels
        out = (batch, sum(copies(time, layer.compress_time)), 2 * height, 2 * width, out_channels)
        weights = channels * out_channels * (16 * self.itemsize + 40)  # the four phases, and fp32 on the way to them

        def workspace(number: int) -> int:
            return self.size((number, height + 1, width + 1, out_channels))

        self.live += self.size(out)
        number = self._most(layer, self.frames_at_once, time, workspace, weights, 0)
        self.reach(layer, weights + workspace(number))
        self.live -= self.size(frames)
        return out


class _Encoder(_Ledger):
    def chunk(self, vae: AutoencoderKLCogVideoX, frames: tuple[int, ...]) -> int:
        encoder, pixels = vae.encoder, self.size(frames)
        norm = (frames[0], 1, 1, 1)
        self.live += pixels
        frames = self.causal_conv(encoder.conv_in, frames)
        self.live -= pixels
        for block in encoder.down_blocks:
            frames = self.resnets(block.resnets, frames, norm)
            for layer in block.downsamplers or ():
                frames = self.downsample(layer, frames)
        frames = self.resnets(encoder.mid_block.resnets, frames, norm)
        before = self.size(frames)
        frames = self.causal_conv(encoder.conv_out, frames, (*norm, frames[4]))
        self.live -= before
        self.reach(encoder.conv_out, self.size(frames))
        return self.size(frames)

    def downsample(self, layer: nn.Module, frames: tuple[int, ...]) -> tuple[int, ...]:
        batch, time, height, width, channels = frames
        channels = layer.conv.out_channels
        out = (batch, pooled_frames(time, layer.compress_time), height // 2, width // 2, channels)
        self.live += self.size(out)
        self.reach(layer, self.size((height + 1, width + 1, frames[4])) + self.size(out[2:]))
        self.live -= self.size(frames)
        return out
