"""Where an autoencoder runs, and what computes there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cogvx_kernels.cpu import convolution, frames
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
        # In fp32 torch's channels-last convolution rounds two to three times as much as diffusers' layout does.
        ours = on_cpu and dtype == torch.float32 and convolution.why_not() is None
        return cls(device, dtype, impl, "cpu" if ours else "torch")
