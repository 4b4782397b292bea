"""What passes while a process looks, by its own clock. The time of day is somebody's to set: it may jump, and those of
two machines differ, so that it decides nothing that could lose a job or make it twice."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping

_REMEMBERED = 10_000  # jobs
Clock = Callable[[], float]


class Leases:
    """Which leases ran out: those that this process has itself seen unkept for as long as they were given.

    Of the time between two looks counts at most half of that: a machine that stood still wakes up to workers that have
    had no moment to say anything, and gives them one.

    Args:
        clock: seconds, which nobody sets.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock, self._looked_at = clock, clock()
        self._unkept: dict[str, tuple[object, float]] = {}

    def run_out(self, held: Mapping[str, tuple[object, float]]) -> list[str]:
        """The jobs whose lease ran out, of all that are held.

        Args:
            held: by job what changes whenever its lease is kept, and for how many seconds that is.
        """
        now = self._clock()
        passed, self._looked_at = now - self._looked_at, now
        seen, self._unkept = self._unkept, {}
        for job_id, (sign, seconds) in held.items():
            last, unkept = seen.get(job_id, (None, 0.0))
            self._unkept[job_id] = (sign, unkept + min(passed, seconds / 2) if last == sign else 0.0)
        return [job_id for job_id, (_, unkept) in self._unkept.items() if unkept >= held[job_id][1]]


class Presence:
    """How long ago others said something, who note the time of day when they do.

    That is believed of what was noted before this process first looked. Later, whoever noted something new since the
    last look did so since then.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock, self._looked_at = clock, clock()
        self._seen: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def seconds(self, noted: Mapping[str, float]) -> dict[str, float]:
        """Seconds since each that is known said something, by the times that they noted."""
        with self._lock:
            now, day = self._clock(), time.time()
            passed, self._looked_at = now - self._looked_at, now
            seen, self._seen = self._seen, {}
            for name, at in noted.items():
                last, since = seen.get(name, (None, 0.0))
                if last is None:
                    since = now - abs(day - at)
                elif last != at:
                    since = now - min(passed, abs(day - at))
                self._seen[name] = (at, since)
            return {name: now - since for name, (_, since) in self._seen.items()}


class Waits:
    """How long jobs have waited: by the time of day when this process first sees them, then by its own clock."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._began: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()

    def seconds(self, job_id: str, created_at: float) -> float:
        """Seconds that a job has waited which came at that time of day."""
        with self._lock:
            now = self._clock()
            began = self._began.setdefault(job_id, now - max(0.0, time.time() - created_at))
            self._began.move_to_end(job_id)
            if len(self._began) > _REMEMBERED:
                self._began.popitem(last=False)
            return now - began


class Steadiness:
    """Whether the time of day can be believed to be later than it was.

    If it runs ahead of this process's own clock by more than a minute, somebody set it, or the machine slept. It is
    believed a day later, should it still say so.
    """

    JUMP, HOLD = 60.0, 86400.0  # seconds

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._offset = time.time() - clock()
        self._held_since: float | None = None

    def is_steady(self) -> bool:
        now = self._clock()
        offset = time.time() - now
        if offset - self._offset > self.JUMP:
            self._held_since = now if self._held_since is None else self._held_since
            if now - self._held_since < self.HOLD:
                return False
        self._offset, self._held_since = offset, None
        return True
