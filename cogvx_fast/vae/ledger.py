"""Counts what the layers will have alive.

A ledger goes through the layers as `decode_chunk` and `encode_chunk` do and counts every tensor of frames while it is
alive: the frames themselves, a convolution's padded input and output, the causal frames kept for the next chunk and the
norms' tables. Weights, the caller's latents or pixels, and what a convolution library takes for itself are not in it.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import torch
from cogvx_kernels import ops
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import (
    CogVideoXCausalConv3d,
    CogVideoXResnetBlock3D,
    CogVideoXSafeConv3d,
)
from diffusers.models.downsampling import CogVideoXDownsample3D
from diffusers.models.upsampling import CogVideoXUpsample3D
from torch import nn

from ..plan import UNLIMITED, VaePlan
from .chunks import Spans
from .convolution import DirectConvolution, TorchConvolution, WinogradConvolution, convolution_class
from .network import halves
from .resampling import copies, is_direct, pooled_frames, upsamples_at_once

# A convolution's input and output beyond this are computed some rows at a time even without a budget: it costs no time.
WORKSPACE = 128 * 2**20


class Ledger(ABC):
    """Counts what is alive. Layers that can be sliced take as many rows as leave the peak within the budget."""

    def __init__(
        self,
        plan: VaePlan,
        budget: int,
        least: int,
        fixed: Ledger | None,
        spilled: frozenset[nn.Module],
    ):
        # What the torch implementation holds on the way of a number that it writes: both tables', the sum and its SiLU
        # in fp32; of half precision also the number in fp32 and the result.
        itemsize, in_torch = plan.dtype.itemsize, plan.operations == "torch"
        self.filling = 0 if not in_torch else 16 if itemsize == 4 else 20 + itemsize
        self.wide = 0 if not in_torch or itemsize == 4 else 4  # a frame in fp32, for its statistics
        # A GPU's kernel writes its result in place, from frames that are not padded and beside the past. So do a CPU's
        # own, from columns that are padded, too, and weights in their order.
        self.dtype, self.convolution, self.fuses = plan.dtype, plan.convolution, plan.convolution == "triton"
        self.direct = is_direct(plan.convolution, plan.dtype)
        self.itemsize, self.budget, self.least, self.fixed = itemsize, budget, least, fixed
        self.rows: dict[nn.Module, int] = {}
        self.frames_at_once: dict[nn.Module, int] = {}
        self.unpacked: set[nn.Module] = set()  # convolutions that are left to torch
        self.caches: dict[nn.Module, int] = {}
        self.groups = 1
        self.live = self.peak = 0
        self.carried = 0  # bytes of the memory that the frames between two layers lie in
        self.spilled = spilled
        self.waiting: dict[nn.Module, int] = {}  # the most that each layer could spill
        self.spilled_now = self.spilled_bytes = 0
        self.worst: nn.Module | None = None
        self.is_last = False

    def layer(self, vae: nn.Module) -> str:
        return next((name for name, module in vae.named_modules() if module is self.worst), "the joined result")

    def run(self, vae: AutoencoderKLCogVideoX, shape: tuple[int, ...], spans: Spans, keeps_output: bool) -> None:
        batch, channels, _, height, width = shape
        self.groups = vae.config.norm_num_groups
        outputs = 0
        # Of chunks that are alike the last has most alive beside it, and there is one more behind them.
        for (first, last), number in spans.alike():
            self.is_last = last == spans.length
            chunk = self.chunk(vae, (batch, last - first, height, width, channels))
            if keeps_output:
                outputs += number * chunk
                self.live += (number - 1) * chunk
            else:
                self.live -= chunk
        self.reach(None, outputs if spans.number > 1 else 0)

    @abstractmethod
    def chunk(self, vae: AutoencoderKLCogVideoX, frames: tuple[int, ...]) -> int:
        """Goes through one chunk; returns the bytes of its result, which is alive then."""

    def size(self, frames: Iterable[int]) -> int:
        return math.prod(frames) * self.itemsize

    def reach(self, layer: nn.Module | None, extra: int) -> None:
        if self.live + extra > self.peak:
            self.peak, self.worst = self.live + extra, layer

    def packed(self, conv: CogVideoXSafeConv3d, kind: type) -> int:
        """Bytes of a weight in the order that `kind` of convolution reads, beside the layer's own."""
        size = conv.out_channels, conv.in_channels, conv.kernel_size
        if kind is WinogradConvolution:
            return 4 * ops.packed_conv3d_size(*size, "winograd", self.dtype)
        if kind is DirectConvolution:
            return 4 * ops.packed_conv3d_size(*size, "direct")
        return self.size(conv.weight.shape) if self.fuses else 0

    def wait(self, layer: nn.Module, size: int) -> None:
        """`size` bytes more (or less) of a layer wait: where they count, or spilled."""
        self.waiting[layer] = max(self.waiting.get(layer, 0), size)
        if layer in self.spilled:
            self.spilled_now += size
            self.spilled_bytes = max(self.spilled_bytes, self.spilled_now)
        else:
            self.live += size

    def causal_conv(
        self,
        layer: CogVideoXCausalConv3d,
        frames: tuple[int, ...],
        norm: tuple[int, ...] | None = None,
        whole: int | None = None,
        in_slices: int | None = None,
        beside: int = 0,
        has_place: bool = True,
    ) -> tuple[int, ...]:
        """A causal convolution of `frames`, which stay alive; so do those that it makes.

        Args:
            norm: shape `(batch, time, height, width)` of the latents that modulate the norm before it, of ones where
                nothing does; None where there is no norm.
            whole: bytes of memory that the result needs of its own, where that is not its size.
            in_slices: the same if it is computed in slices.
            beside: bytes that slices need beside them.
            has_place: whether there is memory for the results when they are computed in slices.
        """
        batch, time, height, width, channels = frames
        out = (batch, time, height, width, layer.conv.out_channels)
        history = layer.time_kernel_size - 1
        whole = self.size(out) if whole is None else whole
        in_slices = whole if in_slices is None else in_slices
        if norm is not None:
            self.reach(layer, batch * height * width * channels * self.wide)
            if self.fuses:  # what the kernel joins: a mean and a sum for each group and 64 pixels, or more pixels
                self.reach(layer, 8 * batch * self.groups * min(-(-time * height * width // 64), 4096))
        old = self.caches.pop(layer, 0)
        if not self.is_last:
            self.caches[layer] = old or self.size((batch, history, height, width, channels))
            self.wait(layer, self.caches[layer] - old)

        conv = layer.conv
        kind = convolution_class(conv, self.convolution, self.dtype, math.prod(frames[:4]))
        if kind is WinogradConvolution:
            row = 2 * self.size((batch, history + time, 3, width + 2, channels))
            if self._spares_weights(layer, self.packed(conv, kind) + in_slices + beside + row):
                kind = TorchConvolution
        packed, border = (
            self.packed(conv, kind),
            conv.padding[2] if kind in (DirectConvolution, WinogradConvolution) else 0,
        )
        in_place = (border or self.fuses) and has_place

        def workspace(rows: int) -> int:
            buffer = packed + self.size((batch, history + time, rows + 2, width + 2 * border, channels))
            read = min(rows + 2, height)
            if self.fuses:
                buffer = packed + self.size((batch, time, read, width, channels))
            filled, taken = batch * read * channels * width * self.filling, 0
            if norm is not None:
                # The tables in fp32; while they are made, also in half precision. And of one time the rows and then
                # the columns that are taken from them by the torch implementation.
                low = min(norm[2], -(-read * norm[2] // height) + 1)
                table = norm[0] * norm[1] * low * norm[3] * channels
                taken = 4 * batch * read * norm[3] * channels if self.filling else 0
                filled = max(8 * table + filled + taken, table * (8 + (self.itemsize if self.itemsize < 4 else 0)))
            cached = 0
            if layer in self.spilled and (old or not self.fuses):  # what is read of it, or a frame on its way there
                cached = self.size((*((batch, history) if old else (1, 1)), read, width, channels))
            if in_place and (rows < height or whole == 0):
                return buffer + max(filled, cached)
            result = self.size((batch, time, rows, width, out[4]))
            return buffer + max(filled, cached + result if self.fuses else max(cached, result))

        rows = self._choose(layer, self.rows, height, workspace, whole, in_slices + beside, packed)
        # In slices the result is there beside the slice; in one, the slice is the result.
        self.reach(layer, workspace(rows) + (in_slices + beside if rows < height else 0))
        if self.is_last:
            self.wait(layer, -old)
        self.live += in_slices if rows < height else whole
        return out

    def _choose(
        self,
        layer: nn.Module,
        chosen: dict,
        most: int,
        workspace: Callable[[int], int],
        whole: int,
        in_slices: int,
        weights: int = 0,
    ) -> int:
        """As many rows (or frames) at a time as fit; the fewest that any chunk could take.

        `weights`: bytes of the workspace that slices do not make less.
        """
        if self.fixed is not None:
            number = getattr(self.fixed, "rows" if chosen is self.rows else "frames_at_once").get(layer, most)
            number = min(number, most)
        elif self.budget == UNLIMITED:
            number = _largest(most, workspace, WORKSPACE + weights)
        elif self.live + max(workspace(most), whole) <= self.budget:
            number = most
        else:
            number = _largest(most - 1, workspace, max(self.budget - self.live - in_slices, self.least))
        if number < most:
            chosen[layer] = min(number, chosen.get(layer, number))
        return number

    def _spares_weights(self, layer: nn.Module, taken: int) -> bool:
        """Whether a budget has no room for a reordered copy of a layer's weights, with which a row takes `taken`.

        The last resort, as it costs time; and only where torch's convolution, which needs none, keeps the contract
        too: not in fp32.
        """
        if self.least > 0 or self.budget == UNLIMITED or self.dtype == torch.float32:
            return False
        if layer in self.fixed.unpacked if self.fixed is not None else self.live + taken > self.budget:
            self.unpacked.add(layer)
        return layer in self.unpacked

    def resnets(
        self, blocks: Iterable[CogVideoXResnetBlock3D], frames: tuple[int, ...], norm: tuple[int, ...]
    ) -> tuple[int, ...]:
        shares = False  # whether what is between a block's convolutions lies in the memory of its input
        for block in blocks:
            before = self.carried
            hidden_size = self.size((*frames[:4], block.conv1.conv.out_channels))
            in_slices, waiting = (0, self.size((*frames[:2], 1, *frames[3:]))) if halves(block) else (None, 0)
            hidden = self.causal_conv(block.conv1, frames, norm, 0 if shares else None, in_slices, waiting, not waiting)
            if halves(block) and self.rows_of(block.conv1) < frames[2]:
                shares = True
                # A slice of the result, and one frame of it of the shortcut.
                slices = self.size((frames[0], 1 + frames[1], self.rows_of(block.conv1), frames[3], hidden[4]))
                self.reach(block, waiting + slices)
            elif block.in_channels != block.out_channels:
                if block.use_conv_shortcut:
                    self.causal_conv(block.conv_shortcut, frames)
                else:
                    self.live += self.size(hidden)
                    self.reach(block, 0)
                self.live -= before
                self.carried = self.size(hidden)
            frames = hidden
            self.causal_conv(block.conv2, hidden, norm, whole=0)
            if not shares:
                self.live -= hidden_size
        return frames

    def rows_of(self, layer: nn.Module) -> int:
        return self.rows.get(layer, sys.maxsize)


def _largest(most: int, workspace: Callable[[int], int], limit: int) -> int:
    """The largest number up to `most` whose workspace is within `limit`, at least 1; workspaces grow with it."""
    low, high = 1, max(most, 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if workspace(middle) <= limit else (low, middle - 1)
    return low


class DecoderLedger(Ledger):
    def chunk(self, vae: AutoencoderKLCogVideoX, frames: tuple[int, ...]) -> int:
        decoder, latents = vae.decoder, self.size(frames)
        norm = frames[:4]
        self.live += latents
        frames = self.causal_conv(decoder.conv_in, frames)
        self.carried = self.size(frames)
        frames = self.resnets(decoder.mid_block.resnets, frames, norm)
        for block in decoder.up_blocks:
            frames = self.resnets(block.resnets, frames, norm)
            for layer in block.upsamplers or ():
                frames = self.upsample(layer, frames)
        pixels = self.size((*frames[:4], decoder.conv_out.conv.out_channels))
        aside = decoder.conv_out in self.spilled
        self.causal_conv(decoder.conv_out, frames, norm, whole=0 if aside else None, has_place=not aside)
        self.live += (pixels if aside else 0) - self.carried
        self.reach(decoder.conv_out, pixels)  # turned to channels first
        self.live -= latents
        return pixels

    def upsample(self, layer: CogVideoXUpsample3D, frames: tuple[int, ...]) -> tuple[int, ...]:
        batch, time, height, width, channels = frames
        out_channels = layer.conv.out_channels
        out = (batch, sum(copies(time, layer.compress_time)), 2 * height, 2 * width, out_channels)
        # The four phases' weights; on the way to them sums in fp32, or both orders of them.
        each = channels * out_channels
        packed = ops.packed_conv3d_size(out_channels, channels, (1, 2, 2), "direct") if self.direct else 0
        weights = 16 * packed if self.direct else 16 * each * self.itemsize
        self.reach(layer, weights + each * (20 * self.itemsize if self.direct else 40))
        waits = batch * time * self.size((height, width, channels))
        is_strided = self.carried != waits
        aside = layer in self.spilled
        if upsamples_at_once(layer, self.convolution, self.spilled):
            self.waiting[layer] = max(self.waiting.get(layer, 0), waits)
            # In fp32 on their way 53 numbers for each pair of channels, then the phases'.
            self.reach(layer, channels * out_channels * 53 * 4)
            weights = channels * out_channels * 16 * self.itemsize
            self.reach(layer, weights + self.size(out) + (waits if is_strided else 0))
            self.live += self.size(out) - self.carried
            self.carried = self.size(out)
            return out

        def read(frames: int, rows: int) -> int:
            return self.size((frames, min(rows + 2, height), width, channels))

        def product(frames: int, rows: int) -> int:
            if self.direct:
                return self.size((rows + 2, width + 2, channels))
            return self.size((frames, min(rows + 2, height) + 1, width + 1, out_channels))

        def strip(rows: int) -> int:
            return read(1, rows) * (batch if aside else 1 if is_strided else 0) + product(1, rows)

        def whole_frames(number: int) -> int:
            return read(number, height) * (batch if aside else 1 if is_strided else 0) + product(number, height)

        self.wait(layer, waits)
        self.live += (0 if aside else self.carried - waits) - self.carried
        self.live += self.size(out) + weights
        number = self._choose(layer, self.frames_at_once, time, whole_frames, 0, 0)
        rows = self._choose(layer, self.rows, height, strip, 0, 0) if number == 1 else height
        self.reach(layer, whole_frames(number) if rows == height else strip(rows))
        self.wait(layer, -waits)
        self.live -= (0 if aside else self.carried - waits) + weights
        self.carried = self.size(out)
        return out


class EncoderLedger(Ledger):
    def chunk(self, vae: AutoencoderKLCogVideoX, frames: tuple[int, ...]) -> int:
        encoder, pixels = vae.encoder, self.size(frames)
        norm = (frames[0], 1, 1, 1)
        self.live += pixels
        frames = self.causal_conv(encoder.conv_in, frames)
        self.carried = self.size(frames)
        self.live -= pixels
        for block in encoder.down_blocks:
            frames = self.resnets(block.resnets, frames, norm)
            for layer in block.downsamplers or ():
                frames = self.downsample(layer, frames)
        frames = self.resnets(encoder.mid_block.resnets, frames, norm)
        frames = self.causal_conv(encoder.conv_out, frames, norm)
        self.live -= self.carried
        self.reach(encoder.conv_out, self.size(frames))
        return self.size(frames)

    def downsample(self, layer: CogVideoXDownsample3D, frames: tuple[int, ...]) -> tuple[int, ...]:
        batch, time, height, width, channels = frames
        out_channels = layer.conv.out_channels
        out = (batch, pooled_frames(time, layer.compress_time), height // 2, width // 2, out_channels)
        self.live += self.size(out)
        # Beside the padded frame our own convolution has its weights, torch's makes a result of its own.
        packed = ops.packed_conv3d_size(out_channels, channels, (1, 3, 3), "direct") if self.direct else 0
        beside = 4 * packed if self.direct else self.size(out[2:])
        self.reach(layer, self.size((height + 1, width + 1, channels)) + beside)
        self.live -= self.carried
        self.carried = self.size(out)
        return out
