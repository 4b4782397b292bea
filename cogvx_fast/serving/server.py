"""A whole server: HTTP in this process, a worker process for each device, and the sweeping of what is old."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

import uvicorn

from cogvx_fast.machine import return_freed_memory

from .api import build
from .context import Context
from .deliveries import Sender
from .logs import logger
from .retention import Retention
from .settings import Settings
from .supervisor import Supervisor

_SWEEP_SECONDS = 60.0
_WORKERS_SECONDS = 9.0  # until they are killed
_ANSWERS_SECONDS = 2  # that open answers have to end
_NICE = 10  # of what answers, beside workers on a CPU


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, closing: threading.Event) -> None:
        super().__init__(config)
        self._closing = closing

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._closing.set()  # streams of events end by themselves then
        super().handle_exit(sig, frame)


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes one that is free.

    Raises:
        OSError: if that is not possible.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(128)
    except OSError:
        listening.close()
        raise
    return listening


def serve(context: Context, workers: Sequence[Settings], listening: socket.socket, ready: Callable[[], None]) -> None:
    """Answer requests until SIGTERM or Ctrl-C; what is being made is parked then, and goes on at the next start.

    Args:
        workers: of each process that is started; none where they run elsewhere.
        ready: called once, when every model is warm.
    """
    config = uvicorn.Config(
        build(context),
        log_config=None,
        access_log=False,
        server_header=False,
        http="h11",  # where another parser is installed, it would be taken, which does not limit headers
        timeout_keep_alive=15,
        timeout_graceful_shutdown=_ANSWERS_SECONDS,
        h11_max_incomplete_event_size=32 * 2**10,
    )
    with _running(context, workers, ready):
        if any("cpu" in settings.devices for settings in workers):
            _give_way()
        _Uvicorn(config, context.closing).run(sockets=[listening])


def _give_way() -> None:
    """Let the workers go first. All threads of a model wait for the one whose core answers requests: five milliseconds
    of that cost it twenty-five, and of a video of a second and a half it was a sixth.

    On Linux that is of a thread, and of those that it starts; the workers are started by another.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, 0, max(_NICE, os.getpriority(os.PRIO_PROCESS, 0)))


@contextlib.contextmanager
def _running(context: Context, workers: Sequence[Settings], ready: Callable[[], None]) -> Iterator[None]:
    supervisor = Supervisor(workers, context.store)
    supervisor.start()

    def end_workers() -> None:
        """As soon as it is told to: workers park while answers still end."""
        context.closing.wait()
        supervisor.end(_WORKERS_SECONDS)

    threads = [
        threading.Thread(target=sweep, args=(context,), daemon=True),
        threading.Thread(target=_say_ready, args=(context, ready), daemon=True),
        threading.Thread(target=end_workers),
    ]
    if context.callbacks is not None:
        sender = Sender(context.store.outbox, context.callbacks, context.closing)
        threads.insert(0, threading.Thread(target=sender.run, daemon=True))
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        context.closing.set()
        threads[-1].join()


def sweep(context: Context) -> None:
    """Remove what is old, again and again, until the server closes."""
    limits = context.limits
    retention = Retention(context.store, context.files, limits.max_age, limits.max_bytes)
    while True:
        try:
            for job_id in retention.sweep():
                logger.info("removed, as it was old", extra={"job": job_id})
        except Exception:
            logger.exception("what is old could not be removed")
        return_freed_memory()  # what answers were made of, which the threads that made them keep for reuse
        if context.closing.wait(_SWEEP_SECONDS):
            return


def _say_ready(context: Context, ready: Callable[[], None]) -> None:
    try:
        for model in context.models:
            model.warm_up()
    except Exception:  # so does the first request, and says it to who asks
        logger.exception("no request can be checked")
    while not context.closing.wait(0.1):
        with contextlib.suppress(Exception):  # asked again
            if context.is_ready():
                ready()
                return
