"""Arguments of the C functions, as ctypes hands them over: C believes what it is told, so tensors are checked here."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

NULL = ctypes.c_void_p(None)


def operand(
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype | tuple[torch.dtype, ...],
    shape: Sequence[int],
    strided: int = 0,
) -> ctypes.c_void_p:
    """Where the numbers of `tensor` are, once it is what C will take it for.

    Args:
        name: of the operand, for the message.
        dtype: what it must be, or one of several.
        shape: what it must be.
        strided: how many leading axes may have any stride; those after them are contiguous.

    Raises:
        ValueError: for any other tensor.
    """
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if tensor.dtype not in dtypes or tensor.shape != tuple(shape) or tensor.device.type != "cpu":
        raise ValueError(
            f"{name} must be {' or '.join(map(str, dtypes))} {tuple(shape)} on a CPU, got {tensor.dtype}"
            f" {tuple(tensor.shape)} on {tensor.device}"
        )
    if not tensor.is_contiguous():
        expected = 1
        for size, stride in zip(reversed(tensor.shape[strided:]), reversed(tensor.stride()[strided:]), strict=True):
            if size > 1 and stride != expected:
                raise ValueError(
                    f"{name} must be contiguous{f' behind its first {strided} axes' if strided else ''}, got strides"
                    f" {tensor.stride()} for {tuple(tensor.shape)}"
                )
            expected *= size
    return ctypes.c_void_p(tensor.data_ptr())


def optional(
    name: str, tensor: torch.Tensor | None, dtype: torch.dtype, shape: Sequence[int], strided: int = 0
) -> ctypes.c_void_p:
    """`operand`, or null for None."""
    return NULL if tensor is None else operand(name, tensor, dtype, shape, strided)


def sizes(*values: int) -> list[ctypes.c_int64]:
    """The sizes, each as an argument of its own."""
    return [ctypes.c_int64(value) for value in values]


def array(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """The numbers as one argument, an array."""
    return (ctypes.c_int64 * len(values))(*values)


def threads() -> ctypes.c_int:
    """How many to run on: torch's own number."""
    return ctypes.c_int(torch.get_num_threads())


def affine(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> list[ctypes.c_void_p]:
    """The affine of a norm over the last axis of `x`."""
    return [optional(name, tensor, x.dtype, x.shape[-1:]) for name, tensor in (("weight", weight), ("bias", bias))]
