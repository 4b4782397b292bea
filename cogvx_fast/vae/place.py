"""Where an autoencoder runs, and what computes there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cogvx_kernels.cpu import convolution, frames, winograd
from cogvx_kernels.triton import why_not as why_not_triton


@dataclass(frozen=True)
class Place:
    """A device and a dtype, and what is best there.

    Attributes:
        impl: of the operations between the convolutions, as `cogvx_kernels.ops` names it.
        product: of the convolutions: "torch", or "cpu" or "triton" for our own.
    """

    device: torch.device
    dtype: torch.dtype
    impl: str = "torch"
    product: str = "torch"

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> Place:
        if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and why_not_triton(device) is None:
            return cls(device, dtype, "triton", "triton")
        on_cpu = device.type == "cpu"
        impl = "cpu" if on_cpu and dtype in frames.DTYPES and frames.why_not() is None else "torch"
        return cls(device, dtype, impl, "cpu" if on_cpu and _convolves(dtype) else "torch")


def _convolves(dtype: torch.dtype) -> bool:
    """Whether our own convolutions are the best of this CPU's.

    In fp32 torch's channels-last ones round two to three times as much as those in diffusers' layout. In bf16 ours
    spare products and do them in fp32: faster than bf16 units of the vector kind, slower than AMX.
    """
    if dtype == torch.float32:
        return convolution.why_not() is None and winograd.why_not() is None
    return dtype == torch.bfloat16 and not torch.cpu._is_amx_tile_supported() and winograd.why_not() is None
