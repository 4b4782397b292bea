"""The operations as Triton kernels, one operation a file. Importing this package alone does not import triton."""

from __future__ import annotations

import importlib.util

import torch


def why_unavailable(device: torch.device | None = None) -> str | None:
    """What keeps these kernels from being imported, or from a `device`, or None. Whether it is there is the caller's
    question."""
    if not importlib.util.find_spec("triton"):
        return "triton is not installed (it comes for Linux only)"
    if device is None:
        return None
    from .targets import target_of

    try:
        target_of(device)
    except ValueError as error:
        return str(error)
    return None
