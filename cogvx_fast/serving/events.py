"""A job as a stream of server-sent events: where it is in the queue, every step, pictures on the way, its end."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
from starlette.concurrency import run_in_threadpool

from .context import Context, Prospect
from .files import PREVIEW
from .jobs import QUEUED, Job

_POLL_SECONDS = 0.03
_BLIND_SECONDS = 0.05  # between two looks at the jobs, where nobody knows whether anything was written
_LOOK_SECONDS = 1.0  # the same, even where nothing was
_QUEUE_SECONDS = 1.0  # between two looks at the queue
_ALIVE_SECONDS = 15.0  # after which something is sent, so that nobody on the way takes it for dead


class Listening:
    """What all who listen to jobs of a server see: one look at the store for all of them, so that many cost no more
    than a few."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._listeners: Counter[str] = Counter()
        self._jobs: dict[str, Job] = {}
        self._looking, self._looked_at, self._newcomers = False, float("-inf"), False
        self._changes = context.store.changes()
        self._prospects: dict[str, Prospect] = {}
        self._asked_at, self._asking = float("-inf"), threading.Lock()

    @contextlib.contextmanager
    def to(self, job: Job) -> Iterator[None]:
        """Within the block the job is among those that are looked at."""
        self._listeners[job.id] += 1
        self._jobs.setdefault(job.id, job)
        self._newcomers = True
        try:
            yield
        finally:
            self._listeners[job.id] -= 1
            if not self._listeners[job.id]:
                del self._listeners[job.id]
                self._jobs.pop(job.id, None)

    async def job(self, job_id: str) -> Job | None:
        """A job as it was at most two looks ago; None: it is gone."""
        if self._is_worth_a_look():
            self._looking, self._newcomers, ids = True, False, list(self._listeners)
            try:
                found = await run_in_threadpool(self.context.store.some, ids)
            finally:
                self._looking, self._looked_at = False, time.monotonic()
            # Whoever has come meanwhile is not among them.
            for one in set(ids) & self._jobs.keys() - found.keys():
                del self._jobs[one]
            self._jobs.update((one, job) for one, job in found.items() if one in self._listeners)
        return self._jobs.get(job_id)

    def _is_worth_a_look(self) -> bool:
        """Whether nobody is looking and something may have happened: what a look takes is taken from a CPU's model."""
        since = time.monotonic() - self._looked_at
        if self._looking or since < _POLL_SECONDS:
            return False
        changed = self._changes()
        return bool(changed) or self._newcomers or since >= (_BLIND_SECONDS if changed is None else _LOOK_SECONDS)

    def prospects(self, job_id: str) -> dict[str, Prospect]:
        """The places of all jobs that have not ended, a second old at most, and this one among them."""
        with self._asking:
            if time.monotonic() - self._asked_at >= _QUEUE_SECONDS or job_id not in self._prospects:
                self._prospects, self._asked_at = self.context.prospects(), time.monotonic()
            return self._prospects


async def events(listening: Listening, job: Job) -> AsyncIterator[str]:
    """The events of a job until it ends, is deleted, or the server closes: `queued`, `step`, `preview`, and
    at the end `completed` or `failed` with the whole video object, or `deleted`."""
    reader = _Reader(listening, job)
    sent_at = time.monotonic()
    with listening.to(job):
        while not listening.context.closing.is_set():
            now = await listening.job(job.id)
            if reader.has_news(now):
                found, ended = await run_in_threadpool(reader.look, now)
                for name, data in found:
                    yield f"event: {name}\ndata: {json.dumps(data)}\n\n"
                    sent_at = time.monotonic()
                if ended:
                    return
            if time.monotonic() - sent_at > _ALIVE_SECONDS:
                yield ": still here\n\n"
                sent_at = time.monotonic()
            await anyio.sleep(_POLL_SECONDS)


class _Reader:
    """What was said already, and what there is to say."""

    def __init__(self, listening: Listening, job: Job) -> None:
        self._listening, self._context, self._id = listening, listening.context, job.id
        self._done, self._looked_at = -1, float("-inf")
        self._queued: dict[str, Any] = {}
        self._picture, self._showed_at = "", time.monotonic()

    def has_news(self, job: Job | None) -> bool:
        """Whether it is worth a look: something happened, or a second has passed."""
        if job is None or job.ended or (job.status != QUEUED and job.done != self._done):
            return True
        return time.monotonic() - (self._looked_at if job.status == QUEUED else self._showed_at) >= _QUEUE_SECONDS

    def look(self, job: Job | None) -> tuple[list[tuple[str, dict[str, Any]]], bool]:
        """Events by name, and whether they are the last ones."""
        if job is None:
            return [("deleted", {"id": self._id})], True
        if job.ended:
            return [(job.status, self._context.video(job).model_dump())], True
        found: list[tuple[str, dict[str, Any]]] = []
        now = time.monotonic()
        if job.status == QUEUED and now - self._looked_at >= _QUEUE_SECONDS:
            self._looked_at = now
            video = self._context.video(job, prospects=self._listening.prospects(job.id))
            queued = {"queue_position": video.queue_position, "eta_seconds": video.eta_seconds}
            if queued != self._queued:
                self._queued = queued
                found.append(("queued", queued))
        if job.status != QUEUED and job.done != self._done:
            self._done = job.done
            found.append(("step", {"done": job.done, "total": job.total, "progress": 100 * job.done // job.total}))
        if job.status != QUEUED and now - self._showed_at >= _QUEUE_SECONDS:
            self._showed_at = now
            picture = self._preview()
            if picture is not None:
                found.append(("preview", {"image": picture}))
        return found, False

    def _preview(self) -> str | None:
        """A picture that was not sent yet, as a data URL."""
        size = self._context.files.size(self._id, PREVIEW)
        if size is None:
            return None
        try:
            data = b"".join(self._context.files.pieces(self._id, PREVIEW, 0, size))
        except FileNotFoundError:
            return None
        digest = hashlib.sha256(data).hexdigest()
        if digest == self._picture:
            return None
        self._picture = digest
        return "data:image/webp;base64," + base64.b64encode(data).decode()
