"""What the Triton kernels share: rows of the stream, 8-bit numbers, and how one is chosen and launched.

Importing this package alone does not import triton.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from ..targets import target_of

# Looked for once: operations ask in regions that dynamo compiles, which must not search for modules.
MISSING = None if importlib.util.find_spec("triton") else "triton is not installed (it comes for Linux only)"


def why_unavailable(device: torch.device | None = None) -> str | None:
    """What keeps these kernels from being imported, or from a `device`, or None. Whether it is there is the caller's
    question."""
    if MISSING is not None or device is None:
        return MISSING
    try:
        target_of(device)
    except ValueError as error:
        return str(error)
    return None


def kernels_of(package: str, module: str = "triton") -> Any:
    """The module of an operation's package that has its Triton kernels; None where triton is not installed."""
    return None if MISSING else importlib.import_module(f"{package}.{module}")
