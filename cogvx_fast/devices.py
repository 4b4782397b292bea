"""Which device a generation is on, told to torch: kernels launch on the current GPU, whichever their tensors lie on."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch

from . import machine


def current(device: torch.device | str | None) -> AbstractContextManager[object]:
    """Within the block, and in this thread, `device` is torch's current GPU; one of another kind changes nothing.

    Operations of torch find the GPU of their tensors by themselves. Launches of Triton, events, streams and questions
    about memory mean the current one.
    """
    if not is_gpu(device):
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def synchronize(device: torch.device | str | None) -> None:
    """Wait until `device` has done what was queued; others are left alone, as a first question would start them."""
    if is_gpu(device):
        torch.cuda.synchronize(device)


def indexed(device: int | str | torch.device) -> torch.device:
    """The device with its number, as tensors have it: "cuda" alone means the current GPU."""
    named = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if str(named) == "cuda" else named


def free_memory(device: torch.device | str) -> int | None:
    """Bytes that a process can still take of the memory of `device`; None: unknown."""
    if is_gpu(device):
        return torch.cuda.mem_get_info(device)[0]
    return machine.free_memory() if torch.device(device).type == "cpu" else None


def is_gpu(device: torch.device | str | None) -> bool:
    """Whether `device` is a GPU that torch can use here."""
    return device is not None and torch.device(device).type == "cuda" and torch.cuda.is_available()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory has run out, which of a CPU's or an Apple GPU's no class of torch does."""
    words = "can't allocate memory", "not enough memory", "MPS backend out of memory"
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
