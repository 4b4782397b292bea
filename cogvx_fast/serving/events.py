"""A job as a stream of server-sent events: where it is in the queue, every step, pictures on the way, its end."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import anyio
from starlette.concurrency import run_in_threadpool

from .context import Context
from .files import PREVIEW
from .store import QUEUED, Job

_POLL_SECONDS = 0.05
_QUEUE_SECONDS = 1.0  # between two looks at the queue
_ALIVE_SECONDS = 15.0  # after which something is sent, so that nobody on the way takes it for dead


async def events(context: Context, job: Job) -> AsyncIterator[str]:
    """The events of a job until it ends, is deleted, or the server closes: `queued`, `step`, `preview`, and
    at the end `completed` or `failed` with the whole video object, or `deleted`."""
    reader = _Reader(context, job)
    sent_at = time.monotonic()
    while not context.closing.is_set():
        found, ended = await run_in_threadpool(reader.look)
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

    def __init__(self, context: Context, job: Job) -> None:
        self._context, self._id = context, job.id
        self._done, self._status, self._looked_at = -1, "", float("-inf")
        self._queued: dict[str, Any] = {}
        self._picture, self._showed_at = "", time.monotonic()

    def look(self) -> tuple[list[tuple[str, dict[str, Any]]], bool]:
        job = self._context.store.get(self._id)
        if job is None:
            return [("deleted", {"id": self._id})], True
        if job.ended:
            return [(job.status, self._context.video(job).model_dump())], True
        found: list[tuple[str, dict[str, Any]]] = []
        now = time.monotonic()
        if job.status == QUEUED and now - self._looked_at >= _QUEUE_SECONDS:
            self._looked_at = now
            video = self._context.video(job)
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
