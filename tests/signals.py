"""Signals as a terminal gives them: under nohup, or in the background, a process and its children ignore some."""

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Within the block SIGHUP and Ctrl-C do what they do on a terminal, here and in processes that are started."""
    before = {
        number: signal.signal(number, handler)
        for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler))
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
