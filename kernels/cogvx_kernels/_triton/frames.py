"""What the kernels over the autoencoder's frames share."""

from __future__ import annotations

import torch


def stride_of_samples(frames: torch.Tensor) -> int:
    """From one sample to the next; 0 where there is one.

    A clip has more than 2^31 numbers from 768 x 1360 on, and triton compiles another kernel for a stride of 64 bits:
    one that no cache was built with, for a number that is multiplied by 0.
    """
    return frames.stride(0) if frames.shape[0] > 1 else 0
