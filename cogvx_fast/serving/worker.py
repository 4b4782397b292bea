"""A process that owns one pipeline and makes one video after the other; of several devices with `team`'s processes.

`python -m cogvx_fast.serving.worker` reads its settings, a line of JSON, from standard input, and ends when that is
closed: whoever started it is gone then. SIGTERM ends it likewise: the running step is finished and saved.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from .clocks import Waits
from .estimate import REMEMBERED, Estimator
from .files import PARKED, PREVIEW, REFERENCE, Files
from .jobs import CANCELLED, Job, Signal, StorageFullError
from .logs import logger, set_up
from .making import Maker
from .progress import CancelledError, Lost, ParkedError
from .scheduler import Candidate, in_order, preempts
from .settings import Settings
from .store import Store
from .team import Team

USAGE_SECONDS = 3600.0  # for which what a key had of the devices counts
_RETRY_SECONDS = 10.0  # until a job is tried again for which there was no room
_FULL_SECONDS = 1.0  # between two tries to tell the store what it has no room for
_LEARN_SECONDS = 10.0
_GLANCE_SECONDS = 0.01  # between two questions whether anything was written
_DEATH_SECONDS = 1.0  # in which this process ends if another of its team has died: then the job has not failed


def new_worker_id() -> str:
    return f"{platform.node()[:32]}-{secrets.token_hex(6)}"


class Worker:
    """Takes jobs of its model from the store, most urgent first, and makes them."""

    def __init__(self, settings: Settings) -> None:
        self.id = settings.worker or new_worker_id()
        self._settings = settings
        self._store = Store(settings.store, durable=False)
        self._changes = self._store.changes()
        self._files = Files(settings.files)
        self._estimator, self._learned_at = Estimator(), float("-inf")
        self._ending, self._ended = threading.Event(), threading.Event()
        self._current: tuple[Job, str] | None = None  # a job and its lease
        self._next: tuple[Job, str] | None = None  # one for which the current is parked
        self._looked_at = 0.0
        self._waits = Waits()
        self._about: dict[str, Any] = {
            "pid": os.getpid(),
            "model": settings.name,
            "device": settings.device,
            "ready": False,
            "steps": 0,
        }

    def end(self) -> None:
        """Take no more work, park what is being made, and end in time: for a signal's handler, and other threads."""
        if not self._ending.is_set():
            self._ending.set()
            threading.Thread(target=self._end_in_time, daemon=True).start()

    def _end_in_time(self) -> None:
        if self._ended.wait(self._settings.drain_seconds):
            return
        for taken in (self._current, self._next):
            if taken is not None:  # a step takes longer than that: what was saved last is where it goes on
                self._store.give_back(taken[0].id, taken[1])
        self._store.gone(self.id)
        os._exit(0)

    def run(self) -> None:
        """Load and warm the model, then work until `end`."""
        threading.Thread(target=self._say_that_it_lives, daemon=True).start()
        team = Team.assemble(self._settings)
        try:
            self.work(Maker(self._settings, team))
        finally:
            team.dismiss()

    def work(self, maker: Maker) -> None:
        """Make one video after the other until `end`."""
        self._about |= {"ready": True, "report": str(maker.pipe.engine_report()), "warm": maker.warm}
        self._learn()
        self._once_there_is_room(lambda: self._store.seen(self.id, self._about))
        logger.info("ready", extra={"worker": self.id})
        try:
            while not self._ending.is_set():
                with contextlib.suppress(StorageFullError):  # of the database: nothing can be taken
                    self._current = self._next or self._take()
                self._next = None
                if self._current is None:
                    self._rest()
                    continue
                self._make(maker, *self._current)
                self._current = None
        finally:
            try:
                with contextlib.suppress(StorageFullError):  # then it is found to be gone
                    self._give_back_next()
                    self._store.gone(self.id)
            finally:
                self._ended.set()

    def _rest(self) -> None:
        """Wait for a moment, or until something is written to the store, if it says so: a job is begun at once."""
        until = time.monotonic() + self._settings.poll_seconds
        while not self._ending.wait(min(_GLANCE_SECONDS, self._settings.poll_seconds)):
            if time.monotonic() >= until or self._changes():
                return

    def _once_there_is_room(self, write: Callable[[], Any]) -> Any:
        """What the store has to be told: again and again while the disk is full, unless this worker is to end."""
        while True:
            try:
                return write()
            except StorageFullError:
                if self._ending.wait(_FULL_SECONDS):
                    raise

    def _give_back_next(self) -> None:
        if self._next is not None:
            self._store.give_back(self._next[0].id, self._next[1])

    def _say_that_it_lives(self) -> None:
        """In a thread: steps may take longer than leases."""
        while True:
            try:
                self._store.seen(self.id, self._about | {"memory": _device_memory(self._settings.devices[0])})
                self._store.reap()
                for taken in (self._current, self._next):
                    if taken is not None:
                        self._store.report(taken[0].id, taken[1], self._settings.lease_seconds)
            except Exception:
                logger.exception("the store cannot be reached", extra={"worker": self.id})
            time.sleep(min(2.0, self._settings.lease_seconds / 3))

    def _take(self) -> tuple[Job, str] | None:
        jobs = {job.id: job for job in self._store.waiting(self._settings.name)}
        if not jobs:
            return None
        order = in_order(map(self._candidate, jobs.values()), self._usage(), self._settings.patience)
        for candidate in order:
            lease = self._store.take(candidate.id, self.id, self._settings.lease_seconds)
            if lease is not None:
                return jobs[candidate.id], lease
        return None

    def _usage(self) -> dict[str, float]:
        return self._store.usage(USAGE_SECONDS)

    def _candidate(self, job: Job, done: int | None = None) -> Candidate:
        if time.monotonic() - self._learned_at > _LEARN_SECONDS:
            self._learn()
        left = self._estimator.seconds(job.request, job.total - (job.done if done is None else done))
        return Candidate(job.id, job.owner, job.priority, self._waits.seconds(job.id, job.created_at), left)

    def _learn(self) -> None:
        self._estimator.learn_from(self._store.finished(REMEMBERED, self._settings.name), [self._about["warm"]])
        self._learned_at = time.monotonic()

    def _make(self, maker: Maker, job: Job, lease: str) -> None:
        about = {"worker": self.id, "job": job.id}
        logger.info("begins", extra=about)
        started = time.monotonic()

        def after_step(done: int) -> bool:
            self._about["steps"] += 1
            busy = job.busy_seconds + time.monotonic() - started
            heard = self._store.report(job.id, lease, self._settings.lease_seconds, done=done, busy_seconds=busy)
            return self._heard(heard) or self._preempted(job, done)

        def between() -> bool:
            """While it is decoded."""
            return self._heard(self._store.report(job.id, lease, self._settings.lease_seconds))

        try:
            video = maker.make(job, self._files, after_step, between)
        except ParkedError as parked:
            busy = job.busy_seconds + time.monotonic() - started
            back = functools.partial(self._store.give_back, job.id, lease, result=parked.so_far, busy_seconds=busy)
            self._once_there_is_room(back)
            logger.info("parked", extra=about)
        except CancelledError:
            self._once_there_is_room(lambda: self._store.fail(job.id, lease, CANCELLED, "it was cancelled"))
            self._files.remove(job.id, PARKED, PREVIEW)
            logger.info("cancelled", extra=about)
        except Lost:
            if self._store.get(job.id) is None:  # it was deleted; else it is another's
                self._files.remove(job.id)
            logger.info("lost", extra=about)
        except StorageFullError as error:
            self._once_there_is_room(lambda: self._store.give_back(job.id, lease, after=_RETRY_SECONDS))
            logger.warning("%s: it is tried again", error, extra=about)
        except Exception as error:
            if not maker.team.is_in_step:
                time.sleep(_DEATH_SECONDS)
            code, message, go_on = maker.what_went_wrong(error)
            logger.exception("failed", extra=about)
            self._once_there_is_room(functools.partial(self._store.fail, job.id, lease, code, message))
            self._files.remove(job.id, PARKED, PREVIEW)
            if not go_on:
                raise
        else:
            busy = job.busy_seconds + time.monotonic() - started
            size = video.bytes + (self._files.size(job.id, REFERENCE) or 0)
            done = functools.partial(self._store.complete, job.id, lease, video.result, size, busy_seconds=busy)
            if self._once_there_is_room(done):
                counts = {f"seconds_{stage}": value for stage, value in video.result["stage_seconds"].items()}
                with contextlib.suppress(StorageFullError):
                    self._store.count(steps=video.result["made_steps"], **counts)
            self._files.remove(job.id, PARKED, PREVIEW)
            logger.info("completed", extra=about)

    def _heard(self, heard: Signal) -> bool:
        """Whether to park."""
        if heard is Signal.LOST:
            raise Lost
        if heard is Signal.CANCEL:
            raise CancelledError
        return self._ending.is_set()

    def _preempted(self, job: Job, done: int) -> bool:
        """Whether to park for another, which this worker has taken then."""
        now = time.monotonic()
        if now - self._looked_at < 2 * self._settings.poll_seconds:
            return False
        self._looked_at = now
        # Those that a worker without work would not have taken yet do not count.
        others = self._store.waiting(self._settings.name)
        there = [(other, self._waits.seconds(other.id, other.created_at)) for other in others]
        waiting = {other.id: other for other, waited in there if waited >= 2 * self._settings.poll_seconds}
        if not waiting:
            return False
        candidates, usage = [self._candidate(other) for other in waiting.values()], self._usage()
        if not preempts(self._candidate(job, done), candidates, usage, self._settings.patience):
            return False
        first = in_order(candidates, usage, self._settings.patience)[0]
        lease = self._store.take(first.id, self.id, self._settings.lease_seconds)
        self._next = None if lease is None else (waiting[first.id], lease)
        return self._next is not None


def _device_memory(device: str) -> int:
    """Bytes that this process has taken of a GPU; 0 on a CPU, or before it has begun."""
    torch = sys.modules.get("torch")
    if torch is None or not device.startswith("cuda") or not torch.cuda.is_initialized():
        return 0
    return int(torch.cuda.memory_reserved(device))


def main() -> None:
    """Work until told to end."""
    set_up()  # what writes by itself has been imported
    settings = Settings.from_json(sys.stdin.readline())
    worker = Worker(settings)

    def end(_number: int, _frame: FrameType | None) -> None:
        worker.end()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server passes it on

    def end_with_who_started_it() -> None:
        while os.read(0, 1):  # not by `sys.stdin`, whose lock a thread that waits would keep at the end of the process
            pass
        worker.end()

    threading.Thread(target=end_with_who_started_it, daemon=True).start()
    worker.run()


if __name__ == "__main__":
    main()
