"""A block's quantized linears as our own products on a GPU, on the very memory of torchao's tensors.

What stands before a product gives it 8 bits and never writes 16: the norms, and GELU between the two of a feed-forward.
With torchao's products rows are written in 16 bits, read, and written in 8, for each of Q, K and V anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from cogvx_kernels import ops
from torch import nn

from .quantized import multiplied_dtype
from .views import as_views


class QuantizedRows(NamedTuple):
    """8-bit numbers `(..., columns)`, and fp32 scales by row `(...)` or by group of columns `(..., groups)`."""

    numbers: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True)
class ScaledLinear:
    """One linear, or several of one input, whose outputs lie side by side.

    Attributes:
        weight: torchao's 8-bit values `(out, in)`; of several linears, the memory that theirs are views of.
        scales: of the output channels, fp32 `(out,)`.
        bias: `(out,)`, or None.
        out_dtype: of what is returned.
    """

    weight: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    out_dtype: torch.dtype

    @classmethod
    def of(cls, *linears: nn.Linear) -> ScaledLinear:
        weights = [linear.weight for linear in linears]
        scales = torch.cat([weight.scale.detach().float().flatten() for weight in weights])
        biases = [linear.bias for linear in linears]
        bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
        return cls(as_views([weight.qdata for weight in weights]), scales, bias, weights[0].dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers that it multiplies."""
        return self.weight.dtype

    def __call__(self, x: torch.Tensor | QuantizedRows) -> torch.Tensor:
        return self.multiply(x, None, self.out_dtype)

    def multiply(
        self, x: torch.Tensor | QuantizedRows, activation: str | None, out_dtype: torch.dtype
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """`ops.scaled_linear` of rows that are in 8 bits already, or come to be here."""
        numbers, scales = ops.quantize_rows(x, self.dtype, impl="triton") if isinstance(x, torch.Tensor) else x
        weight = (self.weight, self.scales, self.bias)
        return ops.scaled_linear(numbers, scales, *weight, activation, out_dtype, "triton")


@dataclass(frozen=True)
class ScaledFeedForward:
    """A feed-forward of two 8-bit products: GELU and rounding to 8 bits are the end of the first."""

    first: ScaledLinear
    second: ScaledLinear

    @property
    def dtype(self) -> torch.dtype:
        return self.first.dtype

    def __call__(self, x: torch.Tensor | QuantizedRows) -> torch.Tensor:
        return self.second(QuantizedRows(*self.first.multiply(x, "gelu_tanh", self.dtype)))


def scaled_products(
    qkv: list[nn.Module], out: nn.Module, ff: list[nn.Module] | None, partly: bool = False
) -> tuple[ScaledLinear | None, ScaledLinear | None, ScaledFeedForward | None]:
    """Our products for the projections to Q, K and V, that of attention's output, and the feed-forward, or None.

    Args:
        ff: its two linears, if GELU stands between them and nothing hangs on the modules around.
        partly: take those that can be ours; else all three or none. Norms write 8 bits for ours alone, so a block that
            is half torchao's would still write and read 16 bits between most of its products.
    """
    parts = (qkv, [out], ff or [])
    taken = [bool(part) and _are_one(part) for part in parts]
    if not (any(taken) if partly else all(taken)):
        return None, None, None
    return (
        ScaledLinear.of(*qkv) if taken[0] else None,
        ScaledLinear.of(out) if taken[1] else None,
        ScaledFeedForward(*map(ScaledLinear.of, ff)) if taken[2] else None,
    )


def _are_one(linears: list[nn.Module]) -> bool:
    """Whether all are W8A8 of one 8-bit type, and all or none have a bias."""
    dtypes = {multiplied_dtype(linear) for linear in linears}
    if len(dtypes) > 1 or None in dtypes:
        return False
    alike = len({linear.bias is None for linear in linears}) == 1
    return alike and all(linear.weight.qdata.is_contiguous() for linear in linears)
