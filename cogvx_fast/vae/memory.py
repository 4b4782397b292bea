"""What the layers will allocate, known before they run: the peak, and rows at a time that keep it within a budget."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

from diffusers import AutoencoderKLCogVideoX
from torch import nn

from .history import place_of
from .ledger import DecoderLedger, EncoderLedger, Ledger
from .place import Place

# Slices of less cost time, for the rows that two slices share: first other things than that are tried.
SMALL_WORKSPACE = 32 * 2**20


class BudgetError(ValueError):
    """A budget that is too small; `smallest`: the bytes that would do."""

    def __init__(self, message: str, smallest: int):
        super().__init__(message)
        self.smallest = smallest


@dataclass(frozen=True)
class MemoryPlan:
    """How the layers run and what that takes.

    Attributes:
        peak: bytes alive at the worst moment.
        layer: which layer that moment is in.
        rows: of a convolution computed at a time, where that is not all of them.
        frames_at_once: frames upsampled at a time, likewise.
        elsewhere: layers whose waiting frames lie outside of the device's memory, see `history`.
        plain: convolutions whose weights, in an order of our own, the budget has no room for: they are left to torch.
        put_away: the most bytes that are there, in `place` (in words).
    """

    peak: int
    layer: str
    rows: dict[nn.Module, int] = field(repr=False)
    frames_at_once: dict[nn.Module, int] = field(repr=False)
    elsewhere: frozenset[nn.Module] = field(default=frozenset(), repr=False)
    plain: frozenset[nn.Module] = field(default=frozenset(), repr=False)
    put_away: int = 0
    place: str = ""

    def __str__(self) -> str:
        sliced = f", {len(self.rows)} convolutions in slices of rows" if self.rows else ""
        put_away = f", {size_in_words(self.put_away)} in {self.place}" if self.put_away else ""
        plain = f", {len(self.plain)} of them torch's for lack of room" if self.plain else ""
        return f"peak {size_in_words(self.peak)} in {self.layer}{sliced}{plain}{put_away}"


def size_in_words(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def plan_decode(
    vae: AutoencoderKLCogVideoX,
    shape: tuple[int, ...],
    spans: list[tuple[int, int]],
    place: Place,
    budget: int | None = None,
    keeps_output: bool = True,
) -> MemoryPlan:
    """The plan for decoding latents of `shape` `(batch, channels, time, height, width)` in chunks of `spans`.

    Args:
        place: where that is; the weights of `vae` are not looked at and may be on the meta device.
        budget: bytes that the peak may have; None: what costs no time.
        keeps_output: whether the pixels of all chunks are joined at the end (not so in a stream).

    Raises:
        BudgetError: if the budget is below the smallest that works, which is named.
    """
    return _plan(DecoderLedger, vae, shape, spans, place, budget, keeps_output)


def plan_encode(
    vae: AutoencoderKLCogVideoX,
    shape: tuple[int, ...],
    spans: list[tuple[int, int]],
    place: Place,
    budget: int | None = None,
) -> MemoryPlan:
    """The same for encoding pixels of `shape` `(batch, channels, frames, height, width)`."""
    return _plan(EncoderLedger, vae, shape, spans, place, budget, True)


def _plan(
    kind: type[Ledger],
    vae: AutoencoderKLCogVideoX,
    shape: tuple[int, ...],
    spans: list[tuple[int, int]],
    place: Place,
    budget: int | None,
    keeps_output: bool,
) -> MemoryPlan:
    def run(elsewhere: list[nn.Module], budget: int | None, least: int = SMALL_WORKSPACE) -> Ledger:
        # First what each layer may take in the worst of the chunks, then what that comes to.
        ledger = None
        for _ in range(2):
            ledger = kind(place, budget, least, ledger, frozenset(elsewhere))
            ledger.run(vae, shape, spans, keeps_output)
        return ledger

    ledger = run([], budget)
    if budget is not None and ledger.peak > budget:
        # The longest that waits first: as few as will do. And if all are not enough, slices that cost time.
        waiting = sorted(ledger.waiting, key=ledger.waiting.get, reverse=True)
        number = bisect.bisect_left(range(len(waiting)), True, key=lambda n: run(waiting[:n], budget).peak <= budget)
        ledger = run(waiting[:number], budget)
        if ledger.peak > budget:
            ledger = run(waiting, budget, least=0)
    if budget is not None and ledger.peak > budget:
        smallest = run(waiting, 0, least=0)
        if smallest.peak > budget:
            raise BudgetError(
                f"a budget of {size_in_words(budget)} is too small for {_in_words(shape)}: the smallest possible is"
                f" {size_in_words(smallest.peak)} ({smallest.peak} bytes), for {smallest.layer(vae)}; fewer rows,"
                " columns or samples at once take less",
                smallest.peak,
            )
        ledger = smallest
    where = place_of(place.device) if ledger.elsewhere else ""
    return MemoryPlan(
        ledger.peak,
        ledger.layer(vae),
        ledger.rows,
        ledger.frames_at_once,
        ledger.elsewhere,
        frozenset(ledger.plain),
        ledger.most_put_away,
        where,
    )


def _in_words(shape: tuple[int, ...]) -> str:
    batch, _, time, height, width = shape
    return f"{batch} x {time} x {height} x {width} (batch, time, height, width)"
