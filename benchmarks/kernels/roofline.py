"""The least time that a board needs for an operation, and what share of it was reached."""

import torch
from cogvx_kernels.boards import board


def tensor_bytes(values):
    """Of all tensors in nested tuples."""
    if torch.is_tensor(values):
        return values.numel() * values.element_size()
    return sum(map(tensor_bytes, values)) if isinstance(values, tuple) else 0


def roofline(seconds, moved_bytes, half_flop=0):
    """For a benchmark's `extra_info`: bytes, FLOP, the bound of the GPU's datasheet in seconds, and its share."""
    done = {"bytes": moved_bytes, "flop": half_flop}
    if not torch.cuda.is_available():
        return done
    name = torch.cuda.get_device_name()
    known = board(name)
    if known is None:
        return done | {"share_of_roofline": None, "why": f"{name} is not in cogvx_kernels/boards.py"}
    bound = max(moved_bytes / (known.bandwidth * 1e9), half_flop / (known.half * 1e12))
    return done | {"bound_seconds": bound, "share_of_roofline": bound / seconds}
