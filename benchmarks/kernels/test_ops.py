"""Micro-benchmarks of the operations, at the width of CogVideoX-2b and 5b and the reduced clip of `dit-2b`.

Run them with `pytest -o addopts= benchmarks/kernels`: the options of the project leave pytest-benchmark out. An
operation is checked before it is timed: its error against float64 may be at most 1.1 times that of plain torch.
"""

import functools

import pytest
import torch
from cogvx_kernels import ops, triton
from cogvx_kernels.cpu import attention, stream
from cogvx_kernels.reference import LOG2_E, sample_step

from benchmarks.kernels.roofline import roofline, tensor_bytes

BATCH, TOKENS, TEXT = 2, 1216, 226
WIDTHS = {"2b": 1920, "5b": 3072}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def arguments(operation, dim):
    """In float64, by name."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    heads = (BATCH, TOKENS, dim // 64, 64)
    if operation == "quantize_qk":
        return {name: randn(*heads) for name in ("query", "key")}
    if operation.endswith("attention"):
        return {name: randn(*heads) for name in ("query", "key", "value")}
    if "norm_rope" in operation:
        angles = torch.rand(TOKENS - TEXT, 64, generator=generator, dtype=torch.float64) * 6
        rotary = (angles.cos(), angles.sin())
    if operation == "norm_rope":
        return {"x": randn(*heads), "weight": randn(64), "bias": randn(64), "rotary": rotary, "text_length": TEXT}
    if operation.startswith("qk_norm_rope"):
        vectors = ("query_weight", "query_bias", "key_weight", "key_bias")
        both = {"query": randn(*heads), "key": randn(*heads)} | {name: randn(64) for name in vectors}
        return both | {"rotary": rotary, "text_length": TEXT}
    stream = {"x": randn(BATCH, TOKENS, dim)}
    residual = {"y": randn(BATCH, TOKENS, dim), "gate": randn(1, 2, dim)}
    norm = {"weight": randn(dim), "bias": randn(dim), "shift": randn(1, 2, dim), "scale": randn(1, 2, dim)}
    return {
        "layer_norm_modulate": stream | norm,
        "gated_residual": stream | residual,
        "gated_residual_layer_norm_modulate": stream | residual | norm,
    }[operation] | {"text_length": TEXT}


def converted(values, dtype):
    def convert(value):
        if isinstance(value, tuple):  # rotary tables stay in float32 at least
            return tuple(table.to(DEVICE, max(dtype, torch.float32, key=lambda d: d.itemsize)) for table in value)
        return value.to(DEVICE, dtype) if torch.is_tensor(value) else value

    return {name: convert(value) for name, value in values.items()}


FRAMES = ("group_norm_statistics", "group_norm_modulate_silu", "causal_conv3d", "upsample_conv2d")  # in test_frames.py
IN_8_BITS = ("quantize_rows", "scaled_linear")  # test_linear.py
# What takes 8 bits is timed together with what makes them.
CASES = [
    (operation, impl)
    for operation, names in ops.IMPLEMENTATIONS.items()
    for impl in names
    if operation not in (*FRAMES, *IN_8_BITS, "quantized_attention")
]


QUANTIZING = ("quantize_qk", "qk_norm_rope_int8")


def skip_where_it_cannot_run(operation, impl, dtype):
    if operation == "int8_attention" and dtype == "fp32":
        pytest.skip("it takes fp16 and bf16")
    if impl == "torch":
        return
    device = "cuda" if impl == "triton" else "cpu"
    why_unavailable = {"cpu": stream.why_unavailable, "triton": triton.why_unavailable}.get(
        impl, lambda: attention.why_unavailable(impl)
    )
    reason = f"it runs on {device}" if device != DEVICE else why_unavailable()
    if impl in attention.IMPLEMENTATIONS and dtype != "bf16":
        reason = "it takes bf16"
    if operation == "attention" and impl == "triton" and dtype == "fp32":
        reason = "it takes fp16 and bf16"
    if reason is not None:
        pytest.skip(reason)


def exact(operation, given):
    """In float64, what the outputs of an operation stand for."""
    given = converted(given, torch.float64)
    if operation in QUANTIZING:
        query, key = ops.qk_norm_rope(**given) if "norm_rope" in operation else given.values()
        return query * (LOG2_E / 8), key - key[:, :: sample_step(key.shape[1])].mean(1, keepdim=True)
    return getattr(ops, operation.removeprefix("int8_"))(**given, impl="torch")


def meaning(operation, outputs):
    """Integers and their scales as the numbers that they stand for."""
    if operation not in QUANTIZING:
        return outputs
    pairs = zip(outputs[::2], outputs[1::2], strict=True)
    return tuple(x * s.repeat_interleave(128, 2)[:, :, : x.shape[1], None].transpose(1, 2) for x, s in pairs)


def error(outputs, expected):
    outputs, expected = (x if isinstance(x, tuple) else (x,) for x in (outputs, expected))
    return max(
        ((out.double() - truth).norm() / truth.norm()).item() for out, truth in zip(outputs, expected, strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("operation", "impl"), CASES)
def test_operation(benchmark, operation, width, dtype, impl):
    skip_where_it_cannot_run(operation, impl, dtype)
    given = converted(arguments(operation, WIDTHS[width]), DTYPES[dtype])
    truth = exact(operation, given)
    call, plain = (functools.partial(getattr(ops, operation), **given, impl=name) for name in (impl, "torch"))
    own, found = (error(meaning(operation, outputs()), truth) for outputs in (plain, call))
    assert found <= 1.1 * own, f"error {found:.3g} is above 1.1 x the reference's own, {own:.3g}: no speed is stated"

    def synchronized():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{operation} {width} {dtype}"
    benchmark.extra_info.update(device=DEVICE, shape=[BATCH, TOKENS, WIDTHS[width]], error=found, own_error=own)
    with torch.no_grad():
        benchmark.pedantic(synchronized, rounds=10, iterations=3, warmup_rounds=3)
    flop = 4 * BATCH * TOKENS**2 * WIDTHS[width] if operation == "attention" and dtype != "fp32" else 0
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(roofline(seconds, tensor_bytes((*given.values(), plain)), flop))
