"""Powers of two on the multiply-add pipe, for a share of the numbers: the special-function unit does 16 a cycle.

`2^x = 2^n * 2^f` with n the nearest integer and f in [-1/2, 1/2] (the range reduction of Cody and Waite 1980); a
polynomial gives 2^f, and n is added to its exponent. Adding 1.5 * 2^23 rounds to the nearest integer and leaves n in
the low bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23
# 2^x from here on down is not a normal number, whose exponent can be added to.
LOWEST = tl.constexpr(-126.0)
# The cubic with the least relative error from 2^f over [-1/2, 1/2] (Remez), rounded to fp32: 7.5e-5 at most, where
# the rounding of a probability to fp16 makes up to 4.9e-4. Lowest power first.
COEFFICIENTS = (0.999928057, 0.693260968, 0.242611125, 0.0551716685)
C0, C1, C2, C3 = (tl.constexpr(c) for c in COEFFICIENTS)
MAX_ERROR = 7.5e-5


@triton.jit
def polynomial_exp2(x):
    """`2^x` of fp32 numbers below 127, within `MAX_ERROR` relative; below -126 it is `2^-126`. NaN becomes a number."""
    x = tl.maximum(x, LOWEST)
    rounded = x + ROUNDER
    fraction = x - (rounded - ROUNDER)
    power = ((C3 * fraction + C2) * fraction + C1) * fraction + C0
    shift = rounded.to(tl.int32, bitcast=True) << 23  # of 1.5 * 2^23 itself nothing is left
    return (power.to(tl.int32, bitcast=True) + shift).to(tl.float32, bitcast=True)


@triton.jit
def exp2(x, SOFT: tl.constexpr):
    """`2^x` of a matrix; one of SOFT groups of 8 columns is `polynomial_exp2`, none if SOFT is 0.

    8 columns are what the fragments of Nvidia's matrix instructions repeat in: which registers hold the share is known
    when the kernel is compiled. The other groups have to tell of NaN.
    """
    if SOFT == 0:
        return tl.exp2(x)
    else:
        soft = (tl.arange(0, x.shape[1]) // 8 % SOFT == 0)[None, :]
        return tl.where(soft, polynomial_exp2(x), tl.exp2(x))
