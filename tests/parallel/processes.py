"""Processes that make a clip together, kept from one test to the next: to start them takes longer than most tests."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import pickle
import tempfile
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MOST = 4
TIMEOUT = 240.0  # seconds that a test's work may take; many times what it does on a busy machine


class Processes:
    """`MOST` processes, of which each call uses the first few as ranks of `torch.distributed`."""

    def __init__(self) -> None:
        # A server that has imported everything and computed nothing is forked: no threads are lost by that.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.parallel.jobs"])
        self._folder = tempfile.TemporaryDirectory(prefix="cogvx-ranks-")
        self._started = 0
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(MOST):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, number: int, job: Any, *arguments: Any, **options: Any) -> list[Any]:
        """What `job(*arguments, **options)` gives at each of `number` ranks.

        Args:
            job: a function of `tests.parallel.jobs`.

        Raises:
            AssertionError: with what each rank has raised, or that it is silent.
        """
        self._started += 1
        order = (number, str(Path(self._folder.name) / str(self._started)), job, arguments, options)
        for pipe in self._pipes[:number]:
            pipe.send_bytes(pickle.dumps(order))
        answers = []
        for rank, pipe in enumerate(self._pipes[:number]):
            assert pipe.poll(TIMEOUT), f"rank {rank} of {number} does not answer; the others: {answers!r:.2000}"
            answers.append(pickle.loads(pipe.recv_bytes()))
        failed = [f"rank {rank}: {answer}" for rank, (worked, answer) in enumerate(answers) if not worked]
        assert not failed, "\n".join(failed)
        return [answer for _, answer in answers]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(rank: int, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    while True:
        try:
            number, store, job, arguments, options = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=number,
                timeout=datetime.timedelta(seconds=TIMEOUT / 2),
            )
            answer = True, job(*arguments, **options)
        except BaseException:
            answer = False, traceback.format_exc()
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
        pipe.send_bytes(pickle.dumps(answer))
