"""One of the processes of a worker that has several devices: `python -m cogvx_fast.serving.member RANK PORT`.

It reads the worker's settings, a line of JSON, from standard input, and ends when that is closed: the worker is gone
then.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from .logs import set_up
from .settings import Settings


def main() -> None:
    """Do what the worker says until it ends."""
    set_up()
    rank, port = map(int, sys.argv[1:])
    settings = Settings.from_json(sys.stdin.readline())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the worker is told, and parks what is being made

    def end_with_the_worker() -> None:
        while os.read(0, 1):
            pass
        os._exit(0)  # whatever it computes, nobody waits for it

    threading.Thread(target=end_with_the_worker, daemon=True).start()
    from .making import Maker
    from .team import Team

    Maker(settings, Team.join(settings, rank, port)).follow()


if __name__ == "__main__":
    main()
