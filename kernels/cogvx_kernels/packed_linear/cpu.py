"""Linear layers whose weights oneDNN reorders once and not at every call, with bias and GELU in the product; and bias
and GELU after a product in fp32, of which oneDNN's is not the fastest."""

from __future__ import annotations

import torch

from .._cpp.arguments import operand, sizes, threads
from .._cpp.build import REORDERED, Source

# Where packing pays. In fp32 torch calls MKL, which took 1.8 s for the products that packed weights did in 2.3 s.
PACKED_LINEAR_DTYPES = (torch.bfloat16,)
_BIAS_GELU = Source.beside(__file__, "bias_gelu.cpp", REORDERED)
why_no_bias_gelu = _BIAS_GELU.why_unavailable


def why_unavailable() -> str | None:
    """What keeps this machine from packing weights, or None."""
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bf16 products for this CPU"
    return None


def pack_linear(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """A reordered copy of `weight` `(out, in)` for inputs of about `rows` rows; only `packed_linear` can read it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)


@torch.library.custom_op("cogvx_kernels::packed_linear_cpu", mutates_args=())
def packed_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, gelu: bool) -> torch.Tensor:
    """`x @ weight^T + bias`, and the tanh form of GELU if `gelu`, of a weight packed by `pack_linear`."""
    activation: tuple[str, list[float], str] = ("gelu", [], "tanh") if gelu else ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, *activation)


@packed_linear.register_fake
def _(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, gelu: bool) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@torch.library.custom_op("cogvx_kernels::bias_gelu_cpu", mutates_args=("x",))
def bias_gelu_(x: torch.Tensor, bias: torch.Tensor) -> None:
    """`x = gelu(x + bias)` in its tanh form, in place; fp32, `x` `(rows, dim)` contiguous, `bias` `(dim,)`."""
    _BIAS_GELU.function("bias_gelu", torch.float32)(
        operand("x", x, torch.float32, x.shape),
        operand("bias", bias, torch.float32, x.shape[1:]),
        *sizes(*x.shape),
        threads(),
    )


bias_gelu_.register_fake(lambda x, bias: None)
