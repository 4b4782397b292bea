"""An open loop: requests come when they come, whether or not others are answered, as people do who see no queue."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .serving_clients import Call, RequestError

PERCENTILES = (50, 95, 99)
_LOOK_SECONDS = 0.05
_GIVEN_UP_SECONDS = 10.0  # that a request has to end in which is given up


@dataclass
class Outcome:
    """What came of one request; times in seconds.

    Attributes:
        due: when it was to be sent, since the load began.
        sent: how much later than that it was.
        first, done: when something was heard of it, and when its video was there, since `due`; None: not.
        error: what went wrong; "": nothing.
    """

    due: float
    sent: float = 0.0
    first: float | None = None
    done: float | None = None
    error: str = ""


@dataclass(frozen=True)
class Load:
    """What came of all requests of a rate: they came for `seconds`, and were waited for `patience` seconds more."""

    seconds: float
    patience: float
    outcomes: list[Outcome] = field(repr=False)

    @property
    def errors(self) -> list[str]:
        return [outcome.error for outcome in self.outcomes if outcome.error]

    def figures(self) -> dict[str, float]:
        """Counts, percentiles and throughput, as a row has them in `extras`.

        A request that is open when waiting ends counts as the slowest: a percentile that falls on one is longer than
        all that is known, and than `patience`: the larger of these is given. What failed is counted, in no percentile.
        """
        kept = [outcome for outcome in self.outcomes if not outcome.error]
        done = [outcome.due + outcome.done for outcome in kept if outcome.done is not None]
        found: dict[str, float] = {
            "sent": len(self.outcomes),
            "ended": len(done),
            "errors": len(self.errors),
            "open": len(kept) - len(done),
            "throughput_per_second": sum(moment <= self.seconds for moment in done) / self.seconds,
            "latest_send_seconds": max((outcome.sent for outcome in self.outcomes), default=0.0),
        }
        for name, times in (("first_event", [one.first for one in kept]), ("done", [one.done for one in kept])):
            for percent in PERCENTILES:
                found[f"{name}_p{percent}_seconds"] = percentile(times, percent, self.patience)
        return found


def percentile(times: Sequence[float | None], percent: float, beyond: float) -> float:
    """The nearest-rank percentile of times, of which None is longer than `beyond` and all others; 0 of no times.

    Where it falls on such a one, the larger of these is given: a lower bound.
    """
    known = sorted(one for one in times if one is not None)
    rank = rank_of(percent, len(times))
    if rank > len(times):
        return 0.0
    return known[rank - 1] if rank <= len(known) else max([beyond, *known])


def rank_of(percent: float, number: int) -> int:
    """The place, from 1, of the nearest-rank percentile among so many values."""
    return max(1, math.ceil(percent / 100 * number))


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Moments of a Poisson process of `rate` a second in the first so many seconds, the same for the same seed."""
    chance, moment, found = random.Random(f"{seed}/{rate!r}"), 0.0, []
    while (moment := moment + chance.expovariate(rate)) < seconds:
        found.append(moment)
    return found


def drive(
    call: Callable[[], Call],
    requests: Sequence[Mapping[str, Any]],
    moments: Sequence[float],
    seconds: float,
    patience: float,
) -> Load:
    """Send each request at its moment, in a thread of its own, and wait for the answers.

    Args:
        call: makes what sends one request.
        moments: in seconds from now, in order.
        seconds: that the load takes; no moment is later.
        patience: seconds for which the last one is waited for; what is open then is given up.
    """
    begun = time.monotonic()
    outcomes = [Outcome(moment) for moment in moments]
    running: list[tuple[threading.Thread, Call]] = []
    for outcome, asked in zip(outcomes, requests, strict=True):
        time.sleep(max(0.0, begun + outcome.due - time.monotonic()))
        one = call()
        thread = threading.Thread(target=_send, args=(one, asked, outcome, begun), daemon=True)
        thread.start()
        running.append((thread, one))
    until = begun + seconds + patience
    while time.monotonic() < until and any(thread.is_alive() for thread, _ in running):
        time.sleep(_LOOK_SECONDS)
    # As they are now: one that is given up ends with an error of ours.
    kept = [Outcome(**vars(outcome)) for outcome in outcomes]
    given_up = [(thread, one) for thread, one in running if thread.is_alive()]
    for _, one in given_up:
        one.give_up()
    for thread, _ in given_up:
        thread.join(_GIVEN_UP_SECONDS)
    return Load(seconds, patience, kept)


def _send(call: Call, asked: Mapping[str, Any], outcome: Outcome, begun: float) -> None:
    def since_due() -> float:
        return time.monotonic() - begun - outcome.due

    def first() -> None:
        outcome.first = since_due()

    outcome.sent = since_due()
    try:
        data = call.make(asked, first)
    except RequestError as error:
        outcome.error = str(error)
        return
    if data[4:8] != b"ftyp":
        outcome.error = "what came is no MP4"
        return
    outcome.done = since_due()
