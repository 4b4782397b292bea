"""Who runs next: pure functions of what waits, without a clock or a store.

Higher priorities go first. Within one, keys take turns: the one goes first that had least of the devices lately. Of its
jobs the one with the highest response ratio goes first (Brinch Hansen 1971): (waited + expected) / expected seconds,
which is the shortest at first, and any in the end.

No job starves, whatever comes after it: one that has waited for `patience` seconds goes before all that have not, the
oldest first. So it waits at most for `patience`, for what is running, and for the jobs that were there before it.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

PATIENCE = 600.0  # seconds
# Parking and going on takes a moment, and text and decoding are not parked: it must be worth it.
_GAIN = 2.0


@dataclass(frozen=True)
class Candidate:
    """A job that waits, or one that runs and could be parked.

    Attributes:
        waited: seconds since it came.
        expected: seconds of a device that it still needs.
    """

    id: str
    owner: str
    priority: int
    waited: float
    expected: float


def in_order(
    candidates: Iterable[Candidate], usage: Mapping[str, float] | None = None, patience: float = PATIENCE
) -> list[Candidate]:
    """Who goes first, second, and so on, if nothing else comes.

    Args:
        usage: seconds of the devices that each owner had lately; those who are not in it had none. What comes before in
            the order counts, too.
        patience: seconds.
    """
    had: defaultdict[str, float] = defaultdict(float, usage or {})
    order = []
    # By priority, and in it by owner: who goes first of one owner's does not depend on the others.
    waiting: dict[int, dict[str, deque[Candidate]]] = defaultdict(lambda: defaultdict(deque))
    for candidate in sorted(candidates, key=lambda c: (-_response_ratio(c), c.expected)):
        if candidate.waited >= patience:
            order.append(candidate)
            had[candidate.owner] += candidate.expected
        else:
            waiting[candidate.priority][candidate.owner].append(candidate)
    order.sort(key=lambda c: -c.waited)
    for _, owners in sorted(waiting.items(), reverse=True):
        while owners:
            owner = min(owners, key=lambda o: (had[o], -_response_ratio(owners[o][0]), owners[o][0].expected))
            first = owners[owner].popleft()
            order.append(first)
            had[owner] += first.expected
            if not owners[owner]:
                del owners[owner]
    return order


def _response_ratio(candidate: Candidate) -> float:
    expected = max(candidate.expected, 1e-3)
    return (candidate.waited + expected) / expected


def preempts(
    running: Candidate,
    waiting: Collection[Candidate],
    usage: Mapping[str, float] | None = None,
    patience: float = PATIENCE,
) -> bool:
    """Whether `running` is to be parked for one that waits: for a higher priority, or for a job so short that it is
    worth it. Never if it has waited for `patience` itself: it was not let in late to be put off again."""
    if not waiting or running.waited >= patience:
        return False
    first = in_order(waiting, usage, patience)[0]
    if first.waited >= patience or first.priority != running.priority:
        return first.priority > running.priority
    return first.expected * _GAIN < running.expected
