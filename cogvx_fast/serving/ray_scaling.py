"""How many replicas a model wants: by the jobs of it that have not ended, asked of the store."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from ray.serve.config import AutoscalingContext

from .store import Store

_LOOK_SECONDS = 1.0


class QueueDepth:
    """A policy of Ray Serve's autoscaler, which knows the requests that are open; jobs outlast theirs.

    It runs in Ray's controller, many times a second, and must not hold it up: the store is asked in a thread, and what
    it said last counts until it answers.

    Args:
        store: URL of the jobs' database.
        jobs_per_replica: to which the number of replicas is fitted.
    """

    def __init__(self, store: str, model: str, jobs_per_replica: float) -> None:
        self._url, self._model, self._jobs_per_replica = store, model, jobs_per_replica
        self._store: Store | None = None
        self._jobs: int | None = None
        self._asked_at = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """The number of replicas that is wanted, to which Ray applies its delays and limits."""
        now = time.monotonic()
        if now - self._asked_at >= _LOOK_SECONDS and (self._asking is None or self._asking.done()):
            self._asked_at = now
            self._asking = asyncio.get_running_loop().create_task(asyncio.to_thread(self._ask))
        if self._jobs is None:
            return context.target_num_replicas, {}
        return self._jobs / self._jobs_per_replica, {}

    def _ask(self) -> None:
        if self._store is None:
            self._store = Store(self._url, durable=False)
        self._jobs = self._store.queue_length(model=self._model)
