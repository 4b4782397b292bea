"""The measure of every implementation: its error against fp64 beside that of the plain torch formula."""

import torch


def randn(*shape, dtype, seed):
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return noise.to(dtype)


def wide(arguments):
    def widen(value):
        if isinstance(value, tuple):
            return tuple(map(widen, value))
        return value.double() if isinstance(value, torch.Tensor) else value

    return [widen(argument) for argument in arguments]


def assert_within_budget(operation, arguments, impl, slack=1.1):
    """The error of `impl` against fp64 is at most `slack` times that of the torch implementation."""
    expected = operation(*wide(arguments), impl="torch")
    outputs = [operation(*arguments, impl=impl), operation(*arguments, impl="torch")]
    results = [[r] if isinstance(r, torch.Tensor) else list(r) for r in (expected, *outputs)]
    assert all(output.dtype == arguments[0].dtype for output in results[1])
    assert_no_worse(*results, slack)


def assert_no_worse(expected, outputs, own, slack=1.1, rounding=1e-7):
    """Each output is no further from what was expected than `slack` times torch's own.

    Results of few numbers may have no error in torch: `rounding`, an ulp of fp32, is no failure.
    """
    for truth, output, reference in zip(expected, outputs, own, strict=True):
        assert output.shape == truth.shape
        error, owned = ((o.double() - truth).norm() / truth.norm() for o in (output, reference))
        assert error <= slack * owned + rounding, f"error {error:.3g}, torch's own {owned:.3g}"
