"""Several processes that `torchrun` has started make the command's videos together; the first speaks and writes.

torchrun --nproc-per-node 4 -m cogvx_fast generate "a panda plays a guitar" --model THUDM/CogVideoX-2b
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from .console import OutputError, UsageError, messages, results, say
from .degrees import parse

if TYPE_CHECKING:
    from cogvx_fast import ParallelConfig

T = TypeVar("T")
# One that waits longer than this for the others ends, and with it all: a step of the largest checkpoint on a slow card
# takes a minute, the loading of its weights from a cold disk several.
PATIENCE = datetime.timedelta(minutes=20)


@dataclass(frozen=True)
class Company:
    """Of the processes that run the command, this one.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        local: its number on its machine, which is that of its GPU.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def company() -> Company:
    """As `torchrun` tells it in the environment; one process where nothing does.

    Raises:
        UsageError: for numbers that are none.
    """
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK"
    if os.environ.get("WORLD_SIZE") is None or os.environ.get("RANK") is None:
        return Company()
    try:
        found = Company(*(int(os.environ.get(name, "0")) for name in names))
    except ValueError:
        told = ", ".join(f"{name}={os.environ.get(name)!r:.40}" for name in names)
        raise UsageError("environment", told, "must be whole numbers, as torchrun sets them") from None
    return found


@contextlib.contextmanager
def joined(device: str | None) -> Iterator[Company]:
    """The processes together for the block, if there are several; all but the first are silent.

    Args:
        device: as the command was asked for; None: the best there is.
    """
    here = company()
    if here.size == 1:
        yield here
        return
    import torch
    import torch.distributed as dist

    gpus = torch.cuda.device_count() if device is None or device.startswith("cuda") else 0
    backend = "nccl" if gpus else "gloo"
    quiet = [(console, console.quiet) for console in (results, messages)]
    try:
        if gpus:
            torch.cuda.set_device(here.local % gpus)
        dist.init_process_group(backend, timeout=PATIENCE)
        for console, _ in quiet:
            console.quiet = not here.is_first
        yield here
    except (UsageError, OutputError) as error:
        # All have found the same, and the first says it; what one alone has found, it says itself.
        if isinstance(error, OutputError) and not here.is_first:
            messages.quiet = False
            say(messages, f"process {here.rank} of {here.size}: {error}", style="red")
            messages.quiet = True
        raise
    finally:
        if here.is_first:
            for console, before in quiet:
                console.quiet = before
        if dist.is_initialized():
            dist.destroy_process_group()


def degrees(text: str | None, heads: int) -> ParallelConfig | str | None:
    """What `--parallel` asks for; None for one process.

    Args:
        heads: of the checkpoint's attention.

    Raises:
        UsageError: for what names no degrees, or such as cannot be, and where there is one process.
    """
    if company().size == 1:
        if text is not None:
            words = "has no effect with one process: start the command with torchrun, see docs/parallel.md"
            raise UsageError("--parallel", repr(text), words)
        return None
    return parse(text, company().size, heads)


def device_of(asked: str | None) -> str | None:
    """The GPU of this process among several on a machine; else what was asked for."""
    here = company()
    if here.size == 1 or asked not in (None, "cuda"):
        return asked
    import torch

    gpus = torch.cuda.device_count()
    if not gpus:
        return asked
    if gpus <= here.local:
        raise UsageError("--nproc-per-node", None, f"must be at most the {gpus} GPUs of this machine")
    return f"cuda:{here.local}"


def as_the_first(value: T) -> T:
    """What the first process has, at all of them: of what is drawn or asked for anew by each."""
    if company().size == 1:
        return value
    import torch.distributed as dist

    said: list[Any] = [value]
    dist.broadcast_object_list(said, src=0)
    return said[0]
