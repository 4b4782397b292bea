"""The operations as Triton kernels, one operation a file. Importing this package alone does not import triton."""

from __future__ import annotations

import importlib.util


def why_not() -> str | None:
    """What keeps these kernels from being imported, or None. Whether a GPU is there is the caller's question."""
    return None if importlib.util.find_spec("triton") else "triton is not installed (it comes for Linux only)"
