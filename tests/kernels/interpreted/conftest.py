"""Buffers with guard bands for what kernels read and write, and bf16 rounded as hardware rounds it."""

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
    rounded = {tl.bfloat16: (torch.bfloat16, torch.int16, np.uint16)}
    rounded[tl.float8e4nv] = (torch.float8_e4m3fn, torch.int8, np.uint8)
    if from_dtype != tl.float32 or to_dtype not in rounded:
        return _drop_bits(data, from_dtype, to_dtype, rounding_mode)
    values = torch.from_numpy(np.ascontiguousarray(data).view(np.float32).copy())
    dtype, bits, unsigned = rounded[to_dtype]
    return values.to(dtype).view(bits).numpy().view(unsigned).reshape(data.shape)


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


def _poisoned(count, dtype):
    """NaN; in int8 what it does not have is -128, a number that nothing quantized symmetrically holds."""
    return _empty(count, dtype=dtype).fill_(-128 if dtype == torch.int8 else float("nan"))


def _is_poison(values):
    return (values == -128).all() if values.dtype == torch.int8 else values.float().isnan().all()


_empty = torch.empty


def guarded(values: torch.Tensor) -> torch.Tensor:
    """A contiguous copy with NaN before and behind it: who reads past it gets NaN into the result."""
    around = _poisoned(values.numel() + 2 * GUARD, values.dtype)
    inside = around[GUARD : GUARD + values.numel()]
    inside.copy_(values.reshape(-1))
    return inside.view(values.shape)


@pytest.fixture(autouse=True)
def outputs(monkeypatch):
    """Fresh memory holds NaN, so that what is not written is seen, and what is written past its ends is, too."""
    made = []

    def guarded_empty(*shape, dtype=None, device=None, **_):
        shape = torch.Size(shape[0] if shape and not isinstance(shape[0], int) else shape)
        dtype = dtype or torch.get_default_dtype()
        around = _poisoned(shape.numel() + 2 * GUARD, dtype)
        made.append(around)
        return around[GUARD : GUARD + shape.numel()].view(shape)

    monkeypatch.setattr(torch, "empty", guarded_empty)
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: guarded_empty(x.shape, dtype=x.dtype))
    yield made
    assert all(_is_poison(around[:GUARD]) and _is_poison(around[-GUARD:]) for around in made)
