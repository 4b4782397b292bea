"""Ctrl-C, SIGTERM and SIGHUP end a command alike: by an exception, so that what it is writing is cleaned up."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

_SIGNALS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,  # systemd, Slurm, `docker stop`, `timeout`
    signal.SIGHUP: signal.SIG_DFL,  # the terminal was closed
}
_ECHO = 1.0  # seconds


class _Held:
    """How many blocks hold signals back, and whether one came."""

    blocks, came = 0, False


@contextlib.contextmanager
def raised_signals() -> Iterator[list[signal.Signals]]:
    """Within the block these signals raise `KeyboardInterrupt`; gives the list that they are noted in.

    What is ignored, as SIGHUP is under `nohup`, stays so, and a handler of somebody else stays, too.
    """
    received: list[signal.Signals] = []
    latest = float("-inf")

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal latest
        # One request may come twice, to the process and to its group: the second must not break off the cleanup.
        is_echo, latest = time.monotonic() - latest < _ECHO, time.monotonic()
        if not is_echo:
            received.append(signal.Signals(number))
            if not _Held.blocks:
                raise KeyboardInterrupt
            _Held.came = True

    ours = threading.current_thread() is threading.main_thread()  # no other may set handlers
    replaced = {number: before for number, before in _SIGNALS.items() if ours and signal.getsignal(number) == before}
    for number in replaced:
        signal.signal(number, interrupt)
    try:
        yield received
    finally:
        for number, before in replaced.items():
            signal.signal(number, before)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Within the block a signal is only noted, and raised at its end: for what must be done whole, and is soon done."""
    _Held.blocks += 1
    # From this thread, too: a write that one interrupts is cut off where streams have no buffer (PYTHONUNBUFFERED).
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _Held.blocks -= 1
        if not _Held.blocks and _Held.came:
            _Held.came = False
            raise KeyboardInterrupt
