"""Powers of two by a polynomial, interpreted."""

import torch
import triton
import triton.language as tl
from cogvx_kernels.int8_attention.triton_exp2 import MAX_ERROR, exp2, polynomial_exp2

from .conftest import guarded

NUMBERS = 4096


@triton.jit
def polynomial_kernel(x_ptr, output_ptr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(output_ptr + index, polynomial_exp2(tl.load(x_ptr + index)))


@triton.jit
def exp2_kernel(x_ptr, output_ptr, COLUMNS: tl.constexpr, SOFT: tl.constexpr):
    index = tl.arange(0, 16)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(output_ptr + index, exp2(tl.load(x_ptr + index), SOFT))


def polynomial(x):
    output = torch.empty(x.shape)
    polynomial_kernel[(x.numel() // NUMBERS,)](guarded(x), output, NUMBERS)
    return output


def relative_error(output, x):
    return ((output.double() - torch.exp2(x.double())) / torch.exp2(x.double())).abs().max().item()


def test_error_over_the_reduced_range():
    """At 65,536 places of [-1/2, 1/2]: between two of them the error, whose slope is below 1e-2, changes by 2e-7."""
    error = relative_error(polynomial(x := torch.linspace(-0.5, 0.5, 16 * NUMBERS)), x)
    assert 0.9 * MAX_ERROR < error <= MAX_ERROR


def test_error_is_the_same_for_every_exponent():
    x = torch.linspace(-125.5, 126, 4 * NUMBERS)
    assert relative_error(polynomial(x), x) <= MAX_ERROR


def test_what_is_too_small_is_next_to_nothing():
    output = polynomial(torch.tensor([-126.0, -127.0, -1e30, float("-inf")]).repeat(NUMBERS // 4))
    assert ((output >= 0) & (output <= 2.0**-125)).all()


def test_which_columns_are_polynomials():
    x = torch.full((16, 64), 0.3)
    output = torch.empty(16, 64)
    for soft in (0, 2, 4):
        exp2_kernel[(1,)](guarded(x), output, 64, soft)
        wrong = (output.double() - 2 ** x.double()).abs() > 1e-6
        expected = torch.zeros(64, dtype=torch.bool) if soft == 0 else torch.arange(64) // 8 % soft == 0
        assert torch.equal(wrong, expected.expand(16, -1))
