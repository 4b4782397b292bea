"""The least time that a board needs for an operation, and what share of it was reached."""

import torch
from cogvx_kernels.targets import board


def roofline(seconds, moved_bytes, half_flop=0, device=None):
    """For a benchmark's `extra_info`: bytes, FLOP, the bound of the GPU's datasheet in seconds, and its share.

    Args:
        device: that it ran on; None, or a CPU: no bound is known.
    """
    done = {"bytes": moved_bytes, "flop": half_flop}
    if device is None or device.type != "cuda":
        return done
    name = torch.cuda.get_device_name(device)
    known = board(name)
    if known is None:
        return done | {"share_of_roofline": None, "why": f"{name} is no board of cogvx_kernels/targets.py"}
    bound = max(moved_bytes / (known.bandwidth * 1e9), half_flop / (known.half * 1e12))
    return done | {"bound_seconds": bound, "share_of_roofline": bound / seconds}
