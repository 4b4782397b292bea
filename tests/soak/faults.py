"""What happens to a server, and when: a schedule by a seed, over the part of a run in which processes may die."""

import os
import random
import signal
import time
from collections import Counter

from . import client
from .client import Unreachable

# How often in a thousand jobs; each at least once.
PER_THOUSAND = {
    "worker killed (kill -9)": 30,
    "server killed (kill -9) and started again": 8,
    "server ended (SIGTERM) and started again": 8,
    "full disk": 8,
    "clock moved": 30,
}
LATEST = 0.7  # of the jobs; what is made after them shows what the faults have left
FULL_SECONDS = 2.0
FURTHEST = 7200.0  # seconds that the clock is moved, either way


def schedule(jobs, seed, kinds):
    """Pairs of the number of a job and the fault that comes when it is asked for."""
    random_ = random.Random(f"{seed}/faults")
    names = [name for name in kinds for _ in range(max(1, round(jobs * PER_THOUSAND[name] / 1000)))]
    random_.shuffle(names)
    distance = LATEST * jobs / max(1, len(names))
    return [(int((index + 0.5) * distance), name) for index, name in enumerate(names)]


class Faults:
    """Does them one after the other."""

    def __init__(self, server, disk, ledger, seed, say):
        self._server, self._disk, self._ledger, self._say = server, disk, ledger, say
        self._random = random.Random(f"{seed}/moments")
        self.counts, self.slowest_end = Counter(), 0.0

    def run(self, planned, stopped):
        """Each when its job is asked for; no more when `stopped()`, as nobody asks then."""
        for number, name in planned:
            while self._ledger.begun < number and not stopped():
                time.sleep(0.02)
            if stopped():
                return
            time.sleep(self._random.uniform(0, 0.5))  # of what is being done then
            self._say(f"{self._ledger.begun} jobs asked for: {name}")
            getattr(self, "_" + name.partition(" (")[0].replace(" ", "_"))()
            self.counts[name] += 1
        self._server.clock.jump(0.0)

    def _worker_killed(self):
        while not (workers := self._server.processes()[1]):
            time.sleep(0.1)
        os.kill(self._random.choice(workers), signal.SIGKILL)

    def _server_killed(self):
        self._server.end(signal.SIGKILL)
        self._server.start()  # while workers of the old one still park

    def _server_ended(self):
        self.slowest_end = max(self.slowest_end, self._server.end(signal.SIGTERM))
        self._server.start()

    def _full_disk(self):
        """New jobs are refused for as long as it is full."""
        self._disk.fill()
        try:
            until = time.monotonic() + FULL_SECONDS
            while time.monotonic() < until:
                try:
                    status, _ = client.request(self._server.port, "POST", "/v1/videos", {"prompt": "no room"})
                    if status == 507:
                        self._ledger.count("answered 507")
                    else:
                        self._ledger.problem(f"a new job was answered {status} where the disk was full")
                except Unreachable:
                    self._ledger.count("not answered")
                time.sleep(0.2)
        finally:
            self._disk.empty()

    def _clock_moved(self):
        self._server.clock.jump(self._random.uniform(-FURTHEST, FURTHEST))
