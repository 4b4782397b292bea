"""Micro-benchmarks of the autoencoder's operations, at the channels of its levels; small frames where there is no GPU.

Run and checked as those of `test_ops.py`. On a GPU a frame is as large as the largest of those channels in the decoder.
"""

import functools

import pytest
import torch
from cogvx_kernels import ops

from benchmarks.kernels.timing import DEVICE, clock, error, generator, timed
from benchmarks.kernels.timing import randn as normal

pytestmark = pytest.mark.benchmark(timer=clock)

FRAMES = ("group_norm_statistics", "group_norm_modulate_silu", "causal_conv3d", "upsample_conv2d")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TIME = 8
# channels: height and width of the largest frames of the decoder that have them
LARGEST = {128: (480, 720), 256: (240, 360), 512: (120, 180)}


def arguments(operation, channels, device=DEVICE):
    """In float32, by name, at the size for `device` and made there; `out` is made by the call."""
    randn = functools.partial(normal, generator=generator(0, device))
    height, width = LARGEST[channels] if device.type == "cuda" else (12, 18)
    x = randn(1, TIME, height, width, channels)
    if operation == "group_norm_statistics":
        return {"x": x, "groups": 32}
    if operation == "group_norm_modulate_silu":
        low = (2, height // 6, width // 6)
        sizes = zip(("frames", "rows", "columns"), x.shape[1:4], low, strict=True)
        indices = {name: torch.arange(size, device=device) * small // size for name, size, small in sizes}
        return {"x": x, "scale": randn(1, *low, channels), "shift": randn(1, *low, channels)} | indices
    spread = 1 / (9 * channels) ** 0.5
    if operation == "upsample_conv2d":
        return {"x": x, "weight": randn(channels, channels, 3, 3) * spread, "bias": randn(channels)}
    weight = randn(channels, channels, 3, 3, 3) * spread
    past, residual = randn(1, 2, *x.shape[2:]), randn(*x.shape)
    return {"x": x, "weight": weight, "bias": randn(channels), "past": past, "residual": residual}


def converted(values, dtype):
    def convert(name, value):
        if not torch.is_tensor(value) or not value.is_floating_point():
            return value
        wide = max(dtype, torch.float32, key=lambda d: d.itemsize)  # the tables stay in float32 at least
        return value.to(wide if name in ("scale", "shift") else dtype)

    return {name: convert(name, value) for name, value in values.items()}


def call(operation, impl, **given):
    function = getattr(ops, operation)
    if operation != "group_norm_modulate_silu":
        return function(**given, impl=impl)
    out = torch.empty_like(given["x"])
    function(**given, out=out, impl=impl)
    return out


CASES = [(operation, impl) for operation in FRAMES for impl in ops.IMPLEMENTATIONS[operation]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", LARGEST)
@pytest.mark.parametrize(("operation", "impl"), CASES)
@torch.no_grad()
def test_operation(benchmark, operation, channels, dtype, impl):
    if impl != "torch":
        device = {"cpu": "cpu", "triton": "cuda"}[impl]
        reason = f"it runs on {device}" if device != DEVICE.type else ops.why_unavailable(operation, impl, DEVICE)
        if impl == "cpu" and DTYPES[dtype] not in ops.CPU_DTYPES:
            reason = "it takes bf16 and fp32"
        if reason is not None:
            pytest.skip(reason)
    values = converted(arguments(operation, channels), DTYPES[dtype])
    exact = call(operation, "torch", **converted(values, torch.float64))
    own, found = (error(call(operation, name, **values), exact) for name in ("torch", impl))
    del exact
    assert found <= 1.1 * own + 1e-7, f"error {found:.3g} is above 1.1 x the reference's own, {own:.3g}"
    benchmark.group = f"{operation} {channels} {dtype}"
    repeated = functools.partial(call, operation, impl)
    timed(benchmark, repeated, values, shape=list(values["x"].shape), error=found, own_error=own)
