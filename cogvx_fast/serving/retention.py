"""What becomes of videos that nobody fetches: they go when they are old, or when there are too many."""

from __future__ import annotations

import math
import time

from .clocks import Clock, Steadiness
from .files import Files
from .logs import logger
from .store import Store


def remove(store: Store, files: Files, job_id: str) -> bool:
    """Forget a job and its files; False: there was none.

    The job goes first: files without one are found by `Retention`, a job without files would be promised to its owner.
    """
    there = store.delete(job_id)
    files.remove(job_id)
    return there


class Retention:
    """Removes what is old.

    Args:
        max_age: seconds after its end for which a job is kept.
        max_bytes: of all files together.
    """

    def __init__(
        self, store: Store, files: Files, max_age: float, max_bytes: int, clock: Clock = time.monotonic
    ) -> None:
        self._store, self._files, self._max_age, self._max_bytes = store, files, max_age, max_bytes
        self._suspects: set[str] = set()
        self._steadiness = Steadiness(clock)

    def sweep(self) -> list[str]:
        """Remove jobs that ended too long ago, the oldest of those that take too much, and files without a job.

        A clock that jumps ahead does not make them old at once, see `Steadiness`.

        Files are nobody's if two sweeps find no job for them: what a request brings is written before its job is.

        Returns:
            The ids of the jobs that are gone.
        """
        steady = self._steadiness.is_steady()
        if not steady:
            logger.warning("the clock was set forward: nothing is removed for its age for a day")
        outdated = self._store.outdated(self._max_age if steady else math.inf, self._max_bytes)
        for job_id in outdated:
            remove(self._store, self._files, job_id)
        orphans = self._files.job_ids() - self._store.ids()
        for job_id in orphans & self._suspects:
            self._files.remove(job_id)
        self._suspects = orphans
        return outdated
