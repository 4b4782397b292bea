"""The processes of a worker that has several devices, one each, which make every video together.

The first is the worker: it takes jobs, knows the store and the files, and says a word before each thing that all do at
once. The others (`member.py`) listen, do it, and listen again. Words go by a group of their own, which may be silent
for as long as nobody wants a video.
"""

from __future__ import annotations

import contextlib
import datetime
import enum
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .logs import logger
from .settings import Settings

T = TypeVar("T")
# One that waits longer than this for the others' numbers ends: a step of the largest checkpoint takes a minute.
_PATIENCE = datetime.timedelta(minutes=20)
_SILENCE = datetime.timedelta(days=3650)
_LOOK_SECONDS = 0.1
_GO_ON, _STOP = False, True


class _Others(enum.Enum):
    """What the others do, as the first knows it."""

    IDLE = "listen for a task"
    LISTENING = "listen, within a task"
    BUSY = "compute"


class Team:
    """The place of this process among those of its worker; as it is made, that of one alone.

    Attributes:
        rank: its number, from 0.
        size: how many they are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._others = _Others.IDLE
        self._words: Any = None if size == 1 else dist.new_group(backend="gloo", timeout=_SILENCE)
        self._members: Sequence[subprocess.Popen[str]] = ()
        self._dismissed = threading.Event()

    @classmethod
    def assemble(cls, settings: Settings) -> Team:
        """In a worker: start the others, and meet them."""
        size = len(settings.devices)
        if size == 1:
            return cls()
        store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False, timeout=_PATIENCE)
        members = [_start(settings, rank, store.port) for rank in range(1, size)]
        watched = threading.Event()
        threading.Thread(target=_end_with_any, args=(members, watched, settings.worker), daemon=True).start()
        team = cls._meet(settings, 0, store)
        team._members, team._dismissed = members, watched
        return team

    @classmethod
    def join(cls, settings: Settings, rank: int, port: int) -> Team:
        """In one of the others: meet the worker, which listens at `port`."""
        store = dist.TCPStore("127.0.0.1", port, len(settings.devices), is_master=False, timeout=_PATIENCE)
        return cls._meet(settings, rank, store)

    @classmethod
    def _meet(cls, settings: Settings, rank: int, store: Any) -> Team:
        device, size = torch.device(settings.devices[rank]), len(settings.devices)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
        return cls(rank, size)

    def dismiss(self) -> None:
        """End the others."""
        self._dismissed.set()
        for member in self._members:
            assert member.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                member.stdin.close()  # it ends then
        for member in self._members:
            try:
                member.wait(5.0)
            except subprocess.TimeoutExpired:
                member.kill()
                member.wait()

    @property
    def is_first(self) -> bool:
        """Whether this is the worker itself."""
        return self.rank == 0

    @property
    def is_in_step(self) -> bool:
        """Whether the others wait for the next task; if not, something went wrong while all computed."""
        return self.size == 1 or self._others is _Others.IDLE

    def say(self, word: T) -> T:
        """The first one's word, at all of them."""
        if self.size == 1:
            return word
        said: list[Any] = [word]
        dist.broadcast_object_list(said, src=0, group=self._words, device=torch.device("cpu"))
        self._others = _Others.BUSY
        return said[0]

    @contextlib.contextmanager
    def task(self, word: Any) -> Iterator[None]:
        """At the first: what all do within the block. If it leaves early, the others stop at their next word."""
        self.say(word)
        try:
            yield
        finally:
            if self.size > 1 and self._others is _Others.LISTENING:
                self.say(_STOP)
                self._others = _Others.IDLE

    def decide(self, stops: Callable[[], bool]) -> bool:
        """After something that all did: whether they stop here, as `stops` says at the first."""
        if self.size == 1:
            return stops()
        if not self.is_first:
            return self.say(_GO_ON)
        self._others = _Others.LISTENING
        decided = self.say(stops())
        if decided == _STOP:
            self._others = _Others.IDLE
        return decided

    def done(self) -> None:
        """At the first, when all have made the same thing to its end, and the others listen."""
        self._others = _Others.LISTENING

    def in_turn(self, parts: Iterator[T]) -> Iterator[T]:
        """Parts that all make together, one after the other, for as long as the first asks for them."""
        if self.size == 1:
            yield from parts
            return
        while self.say(_GO_ON) == _GO_ON:
            part = next(parts, None)
            self._others = _Others.LISTENING
            if part is None:
                self._others = _Others.IDLE
                return
            yield part


def _start(settings: Settings, rank: int, port: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cogvx_fast.serving.member", str(rank), str(port)]
    member = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
    assert member.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died already, which is seen
        member.stdin.write(settings.to_json() + "\n")
        member.stdin.flush()
    return member


def _end_with_any(members: Sequence[subprocess.Popen[str]], dismissed: threading.Event, worker: str) -> None:
    """In a thread: those that are left of a team would wait for the one that died. The job goes on with a new one."""
    while not dismissed.wait(_LOOK_SECONDS):
        for number, member in enumerate(members, 1):
            code = member.poll()
            if code is not None and not dismissed.is_set():
                words = "process %d of %d ended with %s, and the worker with it"
                logger.error(words, number, len(members) + 1, code, extra={"worker": worker})
                os._exit(1)
