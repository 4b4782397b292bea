"""Starts the workers of a server, starts them again when they die, and ends them in time."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from .logs import logger
from .settings import Settings
from .store import Store
from .worker import new_worker_id

_LOOK_SECONDS = 0.1
_LONGEST_PAUSE = 30.0  # seconds before one is started again that dies at once
_HEALTHY_SECONDS = 30.0  # after which a death is no sign of a bad start


@dataclass
class _Process:
    """A worker's place: who is in it now, and when the next one may start if it died."""

    settings: Settings
    running: subprocess.Popen[str] | None = None
    id: str = ""
    started_at: float = 0.0
    not_before: float = 0.0
    pause: float = 0.5


class Supervisor:
    """A process for each of `workers`, which are restarted when they die."""

    def __init__(self, workers: Sequence[Settings], store: Store) -> None:
        self._places = [_Process(settings) for settings in workers]
        self._store, self._ending = store, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="workers", daemon=True)

    def start(self) -> None:
        for place in self._places:
            self._start(place)
        self._thread.start()

    def _start(self, place: _Process) -> None:
        place.id = new_worker_id()
        command = [sys.executable, "-m", "cogvx_fast.serving.worker"]
        # A group of its own: Ctrl-C in a terminal is the server's to pass on.
        place.running = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)
        place.started_at = time.monotonic()
        assert place.running.stdin is not None
        settings = dataclasses.replace(place.settings, worker=place.id)
        with contextlib.suppress(BrokenPipeError):  # it died already
            place.running.stdin.write(settings.to_json() + "\n")
            place.running.stdin.flush()

    def _watch(self) -> None:
        while not self._ending.wait(_LOOK_SECONDS):
            for place in self._places:
                self._look_after(place)

    def _look_after(self, place: _Process) -> None:
        now = time.monotonic()
        if place.running is None:
            if now >= place.not_before:
                self._start(place)
            return
        code = place.running.poll()
        if code is None:
            return
        try:
            self._forget(place)
        except Exception:  # the store is out of reach: it is tried again
            logger.exception("the store cannot be reached")
            return
        place.pause = 0.5 if now - place.started_at > _HEALTHY_SECONDS else min(_LONGEST_PAUSE, place.pause * 2)
        place.not_before = now + (0.0 if place.pause == 0.5 else place.pause / 2)
        place.running = None
        logger.warning("a worker ended with %s; another is started", code, extra={"worker": place.id})

    def _forget(self, place: _Process) -> None:
        self._store.gone(place.id)
        self._store.reap(place.id)

    def end(self, seconds: float) -> None:
        """Tell all workers to park what they make, wait for so many seconds, and kill those that are still there."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join()
        running = [place for place in self._places if place.running is not None]
        for place in running:
            assert place.running is not None
            place.running.terminate()
        until = time.monotonic() + seconds
        for place in running:
            assert place.running is not None
            try:
                place.running.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                place.running.kill()
                place.running.wait()
            self._forget(place)
