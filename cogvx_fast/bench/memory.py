"""The most memory that one call takes beyond what is held before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..machine import return_freed_memory

_RSS = "growth of the process's peak resident memory (VmHWM) during one warm call"
_CUDA = "torch.cuda.max_memory_allocated during one warm call, all that is held included"


def peak_memory(call: Callable[[], Any], device: torch.device) -> tuple[int | None, str]:
    """Bytes that one call of `call` needs at its peak, and in words what exactly was measured.

    On a CPU the kernel counts: the peak of the resident memory is reset, the call is made, and what the process held
    before is subtracted. Weights and tables that exist already are therefore not in it. On CUDA, torch's allocator
    counts, and they are. Where neither is possible: None and the reason.

    Collect Python's garbage before: what it holds would count as held, or be freed by chance in between.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(), _CUDA
    if device.type != "cpu":
        return None, f"not measured: no peak counter is known for {device.type}"
    # What freed tensors left in the heap would be taken for memory that is held.
    return_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
        before = _status("VmRSS")
    except OSError as error:
        return None, f"not measured: /proc/self/clear_refs cannot be written ({error.strerror})"
    call()
    return max(0, _status("VmHWM") - before), _RSS


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
