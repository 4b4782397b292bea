"""Micro-benchmarks of the operations, at the width of CogVideoX-2b and 5b and the reduced clip of `dit-2b`.

Run them with `pytest -o addopts= benchmarks/kernels`: the project's own options skip benchmarks. An operation is
checked before it is timed: its error against float64 may be at most 1.1 times that of the plain torch reference.
"""

import functools

import pytest
import torch
from cogvx_kernels import ops, reference

BATCH, TOKENS, TEXT = 2, 1216, 226
WIDTHS = {"2b": 1920, "5b": 3072}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def arguments(operation, dim):
    """In float64, by name."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    stream = {"x": randn(BATCH, TOKENS, dim)}
    residual = {"y": randn(BATCH, TOKENS, dim), "gate": randn(1, 2, dim)}
    norm = {"weight": randn(dim), "bias": randn(dim), "shift": randn(1, 2, dim), "scale": randn(1, 2, dim)}
    return {
        "layer_norm_modulate": stream | norm,
        "gated_residual": stream | residual,
        "gated_residual_layer_norm_modulate": stream | residual | norm,
    }[operation] | {"text_length": TEXT}


def converted(values, dtype):
    return {name: v.to(DEVICE, dtype) if torch.is_tensor(v) else v for name, v in values.items()}


def error(outputs, expected):
    outputs, expected = (x if isinstance(x, tuple) else (x,) for x in (outputs, expected))
    return max(
        ((out.double() - truth).norm() / truth.norm()).item() for out, truth in zip(outputs, expected, strict=True)
    )


@pytest.mark.parametrize("impl", ops.IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("operation", ["layer_norm_modulate", "gated_residual", "gated_residual_layer_norm_modulate"])
def test_operation(benchmark, operation, width, dtype, impl):
    given = converted(arguments(operation, WIDTHS[width]), DTYPES[dtype])
    exact, plain = (getattr(reference, operation)(**converted(given, d)) for d in (torch.float64, DTYPES[dtype]))
    call = functools.partial(getattr(ops, operation), **given, impl=impl)
    own, found = error(plain, exact), error(call(), exact)
    assert found <= 1.1 * own, f"error {found:.3g} is above 1.1 x the reference's own, {own:.3g}: no speed is stated"

    def synchronized():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{operation} {width} {dtype}"
    benchmark.extra_info.update(device=DEVICE, shape=[BATCH, TOKENS, WIDTHS[width]], error=found, own_error=own)
    with torch.no_grad():
        benchmark.pedantic(synchronized, rounds=10, iterations=3, warmup_rounds=3)
