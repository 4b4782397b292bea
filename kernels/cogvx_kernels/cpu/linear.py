"""Linear layers whose weights oneDNN reorders once and not at every call, with bias and GELU in the product."""

from __future__ import annotations

import torch

# Where packing pays. In fp32 torch calls MKL, which took 1.8 s for the products that packed weights did in 2.3 s.
DTYPES = (torch.bfloat16,)


def why_unavailable() -> str | None:
    """What keeps this machine from packing weights, or None."""
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bf16 products for this CPU"
    return None


def pack(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """A reordered copy of `weight` `(out, in)` for inputs of about `rows` rows; only `linear` can read it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)


@torch.library.custom_op("cogvx_kernels::packed_linear_cpu", mutates_args=())
def linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, gelu: bool) -> torch.Tensor:
    """`x @ weight^T + bias`, and the tanh form of GELU if `gelu`, of a weight packed by `pack`."""
    activation: tuple[str, list[float], str] = ("gelu", [], "tanh") if gelu else ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, *activation)


@linear.register_fake
def _(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, gelu: bool) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))
