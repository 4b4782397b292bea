"""Micro-benchmarks of the autoencoder's operations, at the channels of its levels; small frames where there is no GPU.

Run and checked as those of `test_ops.py`. On a GPU a frame is as large as the largest of those channels in the decoder.
"""

import pytest
import torch
from cogvx_kernels import ops, triton
from cogvx_kernels.cpu import frames as cpu_frames

from benchmarks.kernels.test_ops import DEVICE, FRAMES, error

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TIME = 8
# channels: height and width of the largest frames of the decoder that have them
LARGEST = {128: (480, 720), 256: (240, 360), 512: (120, 180)}


def arguments(operation, channels):
    """In float32, by name; `out` is made by the call."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    height, width = LARGEST[channels] if DEVICE == "cuda" else (12, 18)
    x = randn(1, TIME, height, width, channels)
    if operation == "group_norm_statistics":
        return {"x": x, "groups": 32}
    if operation == "group_norm_modulate_silu":
        low = (2, height // 6, width // 6)
        sizes = zip(("frames", "rows", "columns"), x.shape[1:4], low, strict=True)
        indices = {name: torch.arange(size) * small // size for name, size, small in sizes}
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
            return value.to(DEVICE) if torch.is_tensor(value) else value
        wide = max(dtype, torch.float32, key=lambda d: d.itemsize)  # the tables stay in float32 at least
        return value.to(DEVICE, wide if name in ("scale", "shift") else dtype)

    return {name: convert(name, value) for name, value in values.items()}


def call(operation, given, impl):
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
def test_operation(benchmark, operation, channels, dtype, impl):
    if impl != "torch":
        module, device = {"cpu": (cpu_frames, "cpu"), "triton": (triton, "cuda")}[impl]
        reason = f"it runs on {device}" if device != DEVICE else module.why_unavailable()
        if impl == "cpu" and DTYPES[dtype] not in cpu_frames.DTYPES:
            reason = "it takes bf16 and fp32"
        if reason is not None:
            pytest.skip(reason)
    values = converted(arguments(operation, channels), DTYPES[dtype])
    exact = call(operation, converted(values, torch.float64), "torch")
    own, found = (error(call(operation, values, name), exact) for name in ("torch", impl))
    del exact
    assert found <= 1.1 * own + 1e-7, f"error {found:.3g} is above 1.1 x the reference's own, {own:.3g}"

    def synchronized():
        call(operation, values, impl)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{operation} {channels} {dtype}"
    benchmark.extra_info.update(device=DEVICE, shape=list(values["x"].shape), error=found, own_error=own)
    with torch.no_grad():
        benchmark.pedantic(synchronized, rounds=10, iterations=3, warmup_rounds=3)
