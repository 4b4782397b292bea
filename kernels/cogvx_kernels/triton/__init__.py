"""The operations as Triton kernels, one operation a file. Importing this package alone does not import triton."""

from __future__ import annotations

import importlib.util

import torch

# Looked for once: operations ask in regions that dynamo compiles, which must not search for modules.
_MISSING = None if importlib.util.find_spec("triton") else "triton is not installed (it comes for Linux only)"


def why_unavailable(device: torch.device | None = None) -> str | None:
    """What keeps these kernels from being imported, or from a `device`, or None. Whether it is there is the caller's
    question."""
    if _MISSING is not None or device is None:
        return _MISSING
    from .targets import target_of

    try:
        target_of(device)
    except ValueError as error:
        return str(error)
    return None
