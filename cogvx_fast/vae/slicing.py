"""How the layers are sliced for a budget of memory, planned before they run."""

from __future__ import annotations

import bisect

from diffusers import AutoencoderKLCogVideoX
from torch import nn

from ..plan import UNLIMITED, VaePlan
from .chunks import SlicingPlan, Spans, size_in_words, spill_target
from .ledger import DecoderLedger, EncoderLedger, Ledger

# Slices of less cost time, for the rows that two slices share: first other things than that are tried.
SMALL_WORKSPACE = 32 * 2**20


class BudgetError(ValueError):
    """A budget that is too small; `smallest`: the bytes that would do."""

    def __init__(self, message: str, smallest: int):
        super().__init__(message)
        self.smallest = smallest


def plan_decode(
    vae: AutoencoderKLCogVideoX,
    shape: tuple[int, ...],
    spans: Spans,
    plan: VaePlan,
    keeps_output: bool = True,
) -> SlicingPlan:
    """The plan for decoding latents of `shape` `(batch, channels, time, height, width)` in chunks of `spans`.

    Args:
        plan: where and how, and the budget that the peak must keep; the weights of `vae` are not looked at and may be
            on the meta device.
        keeps_output: whether the pixels of all chunks are joined at the end (not so in a stream).

    Raises:
        BudgetError: if the budget is below the smallest that works, which is named.
    """
    return _plan(DecoderLedger, vae, shape, spans, plan, keeps_output)


def plan_encode(
    vae: AutoencoderKLCogVideoX,
    shape: tuple[int, ...],
    spans: Spans,
    plan: VaePlan,
) -> SlicingPlan:
    """The plan for encoding pixels of `shape` `(batch, channels, frames, height, width)`."""
    return _plan(EncoderLedger, vae, shape, spans, plan, True)


def _plan(
    kind: type[Ledger],
    vae: AutoencoderKLCogVideoX,
    shape: tuple[int, ...],
    spans: Spans,
    plan: VaePlan,
    keeps_output: bool,
) -> SlicingPlan:
    budget = plan.budget

    def run(spilled: list[nn.Module], budget: int, least: int = SMALL_WORKSPACE) -> Ledger:
        # First what each layer may take in the worst of the chunks, then what that comes to.
        first = kind(plan, budget, least, None, frozenset(spilled))
        first.run(vae, shape, spans, keeps_output)
        second = kind(plan, budget, least, first, frozenset(spilled))
        second.run(vae, shape, spans, keeps_output)
        return second

    ledger = run([], budget)
    if budget != UNLIMITED and ledger.peak > budget:
        # The longest that waits first: as few as will do. And if all are not enough, slices that cost time.
        waiting = sorted(ledger.waiting, key=ledger.waiting.__getitem__, reverse=True)
        number = bisect.bisect_left(range(len(waiting)), True, key=lambda n: run(waiting[:n], budget).peak <= budget)
        ledger = run(waiting[:number], budget)
        if ledger.peak > budget:
            ledger = run(waiting, budget, least=0)
    if budget != UNLIMITED and ledger.peak > budget:
        smallest = run(waiting, 1, least=0)
        if smallest.peak > budget:
            raise BudgetError(
                f"a budget of {size_in_words(budget)} is too small for {_in_words(shape)}: the smallest possible is"
                f" {size_in_words(smallest.peak)} ({smallest.peak} bytes), for {smallest.layer(vae)}; fewer rows,"
                " columns or samples at once take less",
                smallest.peak,
            )
        ledger = smallest
    return SlicingPlan(
        ledger.peak,
        ledger.layer(vae),
        ledger.rows,
        ledger.frames_at_once,
        ledger.spilled,
        frozenset(ledger.unpacked),
        ledger.spilled_bytes,
        spill_target(plan.device) if ledger.spilled else "",
    )


def _in_words(shape: tuple[int, ...]) -> str:
    batch, _, time, height, width = shape
    return f"{batch} x {time} x {height} x {width} (batch, time, height, width)"
