"""Micro-benchmarks of the operations at the widths of CogVideoX-2b and 5b: on a GPU of a whole clip, else of a reduced.

Run them with `pytest -o addopts= benchmarks/kernels`: the options of the project leave pytest-benchmark out. An
operation is checked before it is timed: its error against float64 may be at most 1.1 times that of plain torch.
"""

import functools

import pytest
import torch
from cogvx_kernels import ops
from cogvx_kernels.int8_attention.reference import LOG2_E, sample_step

from benchmarks.kernels.roofline import roofline
from benchmarks.kernels.timing import (
    BATCH,
    CHECKED,
    DEVICE,
    TEXT,
    TOKENS,
    WIDTHS,
    clock,
    error,
    stream,
    tensor_bytes,
    timed,
)
from benchmarks.kernels.timing import generator as generator_of
from benchmarks.kernels.timing import randn as normal

pytestmark = pytest.mark.benchmark(timer=clock)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
IN_OTHER_FILES = (
    *("group_norm_statistics", "group_norm_modulate_silu", "causal_conv3d", "upsample_conv2d"),  # test_frames.py
    *("quantize_rows", "scaled_linear"),  # test_linear.py
)
# What takes 8 bits is timed together with what makes them; what a CPU packs is timed in a model.
LEFT_OUT = (*IN_OTHER_FILES, "quantized_attention", "packed_conv3d", "packed_linear", "bias_gelu", "int8_products")
CASES = [
    (operation, impl) for operation, names in ops.IMPLEMENTATIONS.items() for impl in names if operation not in LEFT_OUT
]
QUANTIZING = ("quantize_qk", "qk_norm_rope_int8")


def arguments(operation, width, device=DEVICE):
    """By name, in float32, at the size for `device` and made there."""
    batch, tokens, dim = stream(width, device)
    randn = functools.partial(normal, generator=generator_of(0, device))
    heads = (batch, tokens, dim // 64, 64)
    if operation == "quantize_qk":
        return {name: randn(*heads) for name in ("query", "key")}
    if operation.endswith("attention"):
        return {name: randn(*heads) for name in ("query", "key", "value")}
    if "norm_rope" in operation:
        angles = 3 * randn(tokens - TEXT, 64)
        rotary = (angles.cos(), angles.sin())
    if operation == "norm_rope":
        return {"x": randn(*heads), "weight": randn(64), "bias": randn(64), "rotary": rotary, "text_length": TEXT}
    if operation.startswith("qk_norm_rope"):
        vectors = ("query_weight", "query_bias", "key_weight", "key_bias")
        both = {"query": randn(*heads), "key": randn(*heads)} | {name: randn(64) for name in vectors}
        return both | {"rotary": rotary, "text_length": TEXT}
    x = {"x": randn(batch, tokens, dim)}
    residual = {"y": randn(batch, tokens, dim), "gate": randn(1, 2, dim)}
    norm = {"weight": randn(dim), "bias": randn(dim), "shift": randn(1, 2, dim), "scale": randn(1, 2, dim)}
    return {
        "layer_norm_modulate": x | norm,
        "gated_residual": x | residual,
        "gated_residual_layer_norm_modulate": x | residual | norm,
    }[operation] | {"text_length": TEXT}


def converted(values, dtype):
    def convert(value):
        if isinstance(value, tuple):  # rotary tables stay in float32 at least
            return tuple(table.to(max(dtype, torch.float32, key=lambda d: d.itemsize)) for table in value)
        return value.to(dtype) if torch.is_tensor(value) else value

    return {name: convert(value) for name, value in values.items()}


def skip_where_it_cannot_run(operation, impl, dtype):
    if operation == "int8_attention" and dtype == "fp32":
        pytest.skip("it takes fp16 and bf16")
    if operation == "int8_attention" and impl == "torch" and DEVICE.type == "cuda":
        pytest.skip("the formula holds all scores, 150 GB at this size: it is the specification, none to be timed")
    if impl == "torch":
        return
    device = "cuda" if impl == "triton" else "cpu"
    reason = f"it runs on {device}" if device != DEVICE.type else ops.why_unavailable(operation, impl, DEVICE)
    if operation == "attention" and impl in ("amx", "avx512") and dtype != "bf16":
        reason = "it takes bf16"
    if operation == "attention" and impl == "triton" and dtype == "fp32":
        reason = "it takes fp16 and bf16"
    if reason is not None:
        pytest.skip(reason)


def part_of(operation, given):
    """Of attention the first queries: all in float64, or all of the formula's scores, have no place at a real size."""
    return given | {"query": given["query"][:, :CHECKED]} if operation.endswith("attention") else given


def exact(operation, given):
    """In float64, what the outputs of an operation stand for."""
    given = converted(given, torch.float64)
    if operation in QUANTIZING:
        query, key = ops.qk_norm_rope(**given) if "norm_rope" in operation else given.values()
        return query * (LOG2_E / 8), key - key[:, :: sample_step(key.shape[1])].mean(1, keepdim=True)
    return getattr(ops, operation.removeprefix("int8_"))(**given, impl="torch")


def meaning(operation, outputs):
    """Integers and their scales as the numbers that they stand for; of attention what was checked."""
    if operation.endswith("attention"):
        return outputs[:, :CHECKED]
    if operation not in QUANTIZING:
        return outputs
    pairs = zip(outputs[::2], outputs[1::2], strict=True)
    return tuple(x * s.repeat_interleave(128, 2)[:, :, : x.shape[1], None].transpose(1, 2) for x, s in pairs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("operation", "impl"), CASES)
@torch.no_grad()
def test_operation(benchmark, operation, width, dtype, impl):
    skip_where_it_cannot_run(operation, impl, dtype)
    given = converted(arguments(operation, width), DTYPES[dtype])
    checked = part_of(operation, given)
    call, plain = (functools.partial(getattr(ops, operation), impl=name) for name in (impl, "torch"))
    truth = exact(operation, checked)
    own, found = (error(meaning(operation, outputs), truth) for outputs in (plain(**checked), call(**given)))
    del truth
    assert found <= 1.1 * own, f"error {found:.3g} is above 1.1 x the reference's own, {own:.3g}: no speed is stated"
    benchmark.group = f"{operation} {width} {dtype}"
    timed(benchmark, call, given, shape=list(stream(width)), error=found, own_error=own)
    tokens, outputs = TOKENS[DEVICE.type], call(**given)
    flop = 4 * BATCH * tokens**2 * WIDTHS[width] if operation == "attention" and dtype != "fp32" else 0
    moved = tensor_bytes((given, outputs))
    benchmark.extra_info.update(roofline(benchmark.stats.stats.median, moved, flop, DEVICE))
