"""Buffers with guard bands for what kernels read and write, and bf16 and e4m3 rounded as hardware rounds them."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from triton import language as tl
from triton.runtime import interpreter

GUARD = 64  # elements on each side of a buffer
_drop_bits = interpreter._convert_float


def _round_to_nearest(data, from_dtype, to_dtype, rounding_mode):
    """The interpreter cuts fp32 off to make bf16 or e4m3; GPUs round to nearest even, and so does torch."""
    if from_dtype != tl.float32 or to_dtype not in _NARROW:
        return _drop_bits(data, from_dtype, to_dtype, rounding_mode)
    narrow, bits, integers = _NARROW[to_dtype]
    values = torch.from_numpy(np.ascontiguousarray(data).view(np.float32).copy())
    return values.to(narrow).view(bits).numpy().view(integers).reshape(data.shape)


_NARROW = {
    tl.bfloat16: (torch.bfloat16, torch.int16, np.uint16),
    tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8, np.uint8),
}


interpreter._convert_float = _round_to_nearest


def _exact_dot(self, a, b, accumulator, input_precision, max_num_imprecise_acc):
    """The interpreter multiplies the bits of bf16 as if they were integers; here are the products of the numbers."""
    a, b = (self.create_fp_ext(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b))
    return _dot(self, a, b, accumulator, input_precision, max_num_imprecise_acc)


_dot = interpreter.InterpreterBuilder.create_dot
interpreter.InterpreterBuilder.create_dot = _exact_dot


def _launch(self, *arguments, **keywords):
    """Nothing happens to fake tensors: without the interpreter `wrap_triton` sees to that."""
    if not any(isinstance(value, FakeTensor) for value in (*arguments, *keywords.values())):
        _run(self, *arguments, **keywords)


_run = interpreter.InterpretedFunction.run
interpreter.InterpretedFunction.run = _launch


def poison(dtype: torch.dtype) -> float:
    """What fresh memory is filled with: NaN, and in integers their lowest number, which no operation here writes."""
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min


def is_poison(values: torch.Tensor) -> torch.Tensor:
    return values.float().isnan() if values.is_floating_point() else values == poison(values.dtype)


def guarded(values: torch.Tensor) -> torch.Tensor:
    """A contiguous copy with NaN before and behind it: who reads past it gets NaN into the result."""
    around = values.new_full((values.numel() + 2 * GUARD,), poison(values.dtype))
    inside = around[GUARD : GUARD + values.numel()]
    inside.copy_(values.reshape(-1))
    return inside.view(values.shape)


@pytest.fixture(autouse=True)
def outputs(monkeypatch):
    """Fresh memory holds NaN, so that what is not written is seen, and what is written past its ends is, too."""
    empty, made = torch.empty, []

    def guarded_empty(*shape, dtype=None, device=None, **_):
        shape = torch.Size(shape[0] if shape and not isinstance(shape[0], int) else shape)
        dtype = dtype or torch.get_default_dtype()
        around = empty(shape.numel() + 2 * GUARD, dtype=dtype).fill_(poison(dtype))
        made.append(around)
        return around[GUARD : GUARD + shape.numel()].view(shape)

    monkeypatch.setattr(torch, "empty", guarded_empty)
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: guarded_empty(x.shape, dtype=x.dtype))
    yield made
    assert all(is_poison(around[:GUARD]).all() and is_poison(around[-GUARD:]).all() for around in made)
