"""`torch.set_default_dtype` changes no bit of an operation, and no memory is too small for what C++ writes into it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cogvx_kernels import ops
from cogvx_kernels.adaln import cpu as stream
from cogvx_kernels.conv3d import direct as convolution
from cogvx_kernels.conv3d import winograd
from cogvx_kernels.packed_linear import cpu as linear
from cogvx_kernels.w8a8_linear import cpu as int8

from tests.kernels.budget import randn
from tests.kernels.operations import CASES, Size

ROOT = Path(__file__).resolve().parents[2]
SIZE = Size(batch=2, sequence=37, heads=2, text=5)


def implementations(operation, dtype):
    """What can compute it on this CPU."""
    for impl in ops.IMPLEMENTATIONS.get(operation, ("torch",)):
        takes = {"cpu": ops.CPU_DTYPES, "amx": (torch.bfloat16,), "avx512": (torch.bfloat16,)}.get(impl, (dtype,))
        works = impl == "torch" or (impl != "triton" and ops.why_unavailable(operation, impl) is None)
        works = works and dtype in takes
        if works:
            yield impl


def direct_convolution():
    x, weight = randn(2, 3, 6, 7, 5, dtype=torch.float32, seed=0), randn(9, 5, 3, 3, 3, dtype=torch.float32, seed=1)
    out = torch.full((2, 1, 4, 5, 9), float("nan"), dtype=torch.float32)
    packed = convolution.pack(weight)
    convolution.convolution(x, packed, weight[:, 0, 0, 0, 0].contiguous(), (3, 3, 3), out)
    return packed, out


def fewer_products(dtype):
    x, weight = randn(2, 3, 6, 7, 5, dtype=dtype, seed=0), randn(9, 5, 3, 3, 3, dtype=dtype, seed=1)
    out = torch.full((2, 1, 4, 5, 9), float("nan"), dtype=dtype)
    packed = winograd.pack(weight)
    winograd.convolution(x, packed, randn(9, dtype=torch.float32, seed=2), 3, out)
    return packed, out


def int8_products(dtype):
    x, weight = randn(7, 33, dtype=dtype, seed=0), (randn(20, 33, dtype=torch.float32, seed=1) * 40).to(torch.int8)
    scales, bias = randn(20, dtype=torch.float32, seed=2), randn(20, dtype=torch.float32, seed=3)
    numbers, row_scales = int8.quantize_rows(x)
    sums = int8.int8_products(numbers, weight)
    output = torch.full((7, 20), float("nan"), dtype=dtype)
    int8.dequantize(sums, row_scales, scales, bias, output)
    hidden = int8.gelu_quantize_rows(sums, row_scales, scales, bias)
    return numbers, row_scales, sums, output, *hidden


def bias_gelu():
    x = randn(7, 33, dtype=torch.float32, seed=0)
    linear.bias_gelu_(x, randn(33, dtype=torch.float32, seed=1))
    return x


def packed_linear():
    x, weight = randn(7, 32, dtype=torch.bfloat16, seed=0), randn(20, 32, dtype=torch.bfloat16, seed=1)
    return linear.packed_linear(x, linear.pack_linear(weight, 7), None, True)


def calls():
    """Everything that a CPU computes, by name."""
    found = {}
    for name, case in CASES.items():
        for dtype in case.dtypes:
            for impl in implementations(name, dtype):
                given = case.make(SIZE, dtype)
                found[f"{name}, {dtype}, {impl}"] = lambda c=case, given=given, i=impl: c.call(*given, impl=i)
    alone = {
        direct_convolution: (convolution, [()]),
        fewer_products: (winograd, [(dtype,) for dtype in winograd.TILES]),
        int8_products: (int8, [(dtype,) for dtype in ops.CPU_DTYPES]),
        bias_gelu: (stream, [()]),
        packed_linear: (linear, [()]),
    }
    for call, (library, options) in alone.items():
        for arguments in options if library.why_unavailable() is None else ():
            found[f"{call.__name__}{arguments}"] = lambda call=call, arguments=arguments: call(*arguments)
    return found


def compare():
    """Prints what differs under another default, and how many calls were compared."""
    # The operands are made in fp32 whatever the default, as the package's own are.
    torch.set_default_dtype(torch.float32)
    made = calls()
    expected = {name: tensors(call()) for name, call in made.items()}
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        torch.set_default_dtype(dtype)
        for name, call in made.items():
            for before, after in zip(expected[name], tensors(call()), strict=True):
                same = before.dtype == after.dtype and torch.equal(bits(before), bits(after))
                if not same:
                    print(f"{name}: {after.dtype} differs under {dtype}")
    print(len(made), "compared")


def tensors(result):
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def bits(tensor):
    return tensor.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)


@pytest.mark.slow
def test_the_default_dtype_changes_nothing():
    # In a process of its own: what is wrong here may well end it.
    command = [sys.executable, "-c", f"from {__name__} import compare; compare()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-2000:]}"
    *different, last = done.stdout.splitlines()
    assert not different and int(last.split()[0]) > 40, done.stdout
