"""Arguments of the C functions, as ctypes hands them over."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """Where the tensor's numbers are; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def sizes(*values: int) -> list[ctypes.c_int64]:
    """Each as an argument of its own."""
    return [ctypes.c_int64(value) for value in values]


def array(values: Sequence[int]) -> ctypes.Array:
    """All as one argument, an array."""
    return (ctypes.c_int64 * len(values))(*values)


def threads() -> ctypes.c_int:
    """How many to run on: torch's own number."""
    return ctypes.c_int(torch.get_num_threads())
