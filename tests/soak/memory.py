"""Whether processes grow: resident memory over the jobs that have ended, while none of them is killed."""

import threading
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from .server import memory

SECONDS = 1.0  # between two looks
SHOWN_JOBS = 100  # over which a process was seen, to be shown
LEAST_JOBS = 500  # to be judged: in the first ones threads and caches come
MOST = 0.05  # of its memory that a process may grow in a thousand jobs


@dataclass(frozen=True)
class Growth:
    """Of one process: bytes at the last look, and by a line through all looks bytes a job, over so many jobs."""

    what: str
    bytes: int
    a_job: float
    jobs: int

    @property
    def verdict(self):
        if self.jobs < LEAST_JOBS:
            return "too short to be judged"
        return "flat" if self.is_flat else "GROWS"

    @property
    def is_flat(self):
        return 1000 * self.a_job <= MOST * self.bytes


class Watch:
    """Looks from when it is made until `end`."""

    def __init__(self, server, ledger):
        self._server, self._ledger = server, ledger
        self._seen, self._done = defaultdict(list), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self):
        while not self._done.wait(SECONDS):
            server, workers = self._server.processes()
            for what, pid in [("server", server), *(("worker", pid) for pid in workers)]:
                resident = None if pid is None else memory(pid)
                if resident is not None:
                    self._seen[what, pid].append((self._ledger.ended, resident))

    def end(self):
        """The growth of each process that was seen over `SHOWN_JOBS`; its first third, in which caches fill, is left
        out."""
        self._done.set()
        self._thread.join()
        found = []
        for (what, _), looks in self._seen.items():
            first, last = looks[0][0], looks[-1][0]
            kept = np.array([look for look in looks if look[0] >= first + (last - first) / 3], dtype=float)
            if last - first >= SHOWN_JOBS and len(kept) > 2:
                slope = float(np.polyfit(kept[:, 0], kept[:, 1], 1)[0])
                found.append(Growth(what, int(kept[-1, 1]), slope, last - first))
        return found
