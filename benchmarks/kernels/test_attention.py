"""Attention at the sizes of the checkpoints, ours beside torch's SDPA, flash-attn, xformers and SageAttention.

Run with `pytest -o addopts= benchmarks/kernels/test_attention.py` on a GPU. What is not installed is skipped. Each is
checked before it is timed, on a part of the queries: its error against float64 may be at most 1.1 times SDPA's own; for
SageAttention, which computes QK^T in int8, the signal must be 30 dB above it.
"""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from cogvx_kernels import ops

from benchmarks.kernels.roofline import roofline
from benchmarks.kernels.timing import CHECKED, DEVICE, clock, generator, tensor_bytes, timed

# batch (two with guidance), tokens of text and video, heads of 64
SIZES = {"2b": (2, 17776, 30), "5b": (2, 17776, 48), "1.5-5b": (2, 45106, 48)}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
LEAST_SIGNAL = 30  # dB

pytestmark = [
    pytest.mark.skipif(DEVICE.type != "cuda", reason="torch finds no CUDA GPU"),
    pytest.mark.benchmark(timer=clock),
]


def sdpa(query, key, value):
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def ours():
    reason = ops.why_unavailable("attention", "triton", DEVICE)
    if reason is not None:
        pytest.skip(reason)
    return functools.partial(ops.attention, impl="triton")


def flash():
    return pytest.importorskip("flash_attn", reason="flash-attn is not installed").flash_attn_func


def xformers():
    return pytest.importorskip("xformers.ops", reason="xformers is not installed").memory_efficient_attention


def sage():
    package = pytest.importorskip("sageattention", reason="SageAttention is not installed")
    return functools.partial(package.sageattn, tensor_layout="NHD")


CONTENDERS = {"triton": ours, "sdpa": lambda: sdpa, "flash-attn": flash, "xformers": xformers, "sage": sage}


def error(output, expected):
    return ((output[:, :CHECKED].double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("contender", CONTENDERS)
@torch.no_grad()
def test_attention(benchmark, contender, size, dtype):
    call = CONTENDERS[contender]()
    batch, tokens, heads = SIZES[size]
    shape = (batch, tokens, 3, heads, 64)
    packed = torch.randn(shape, generator=generator(0), device=DEVICE, dtype=DTYPES[dtype])
    query, key, value = (tensor.contiguous() for tensor in packed.unbind(2))
    del packed
    exact = ops.attention(query[:, :CHECKED].double(), key.double(), value.double())
    found, own = (error(attend(query, key, value), exact) for attend in (call, sdpa))
    del exact
    if contender == "sage":
        signal = -20 * math.log10(found)
        assert signal >= LEAST_SIGNAL, f"{signal:.1f} dB, below {LEAST_SIGNAL}: no speed is stated"
    else:
        assert found <= 1.1 * own, f"error {found:.3g} is above 1.1 x SDPA's own, {own:.3g}: no speed is stated"

    benchmark.group = f"attention {size} {dtype}"
    given = {"query": query, "key": key, "value": value}
    timed(benchmark, lambda query, key, value: call(query, key, value), given, shape=list(query.shape), error=found)
    moved, flop = tensor_bytes((query, key, value, query)), 4 * batch * tokens**2 * heads * 64
    benchmark.extra_info.update(gpu=torch.cuda.get_device_name(DEVICE))
    benchmark.extra_info.update(roofline(benchmark.stats.stats.median, moved, flop, DEVICE))
