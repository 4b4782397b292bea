"""Weights in parts: each process holds a share of every block, and those of a block come together while it runs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from .ranks import Ranks


def share_out(blocks: Iterable[nn.Module], ranks: Ranks, device: torch.device) -> None:
    """Leave of each block's weights the share of this process, on `device`; blocks that are shared out already stay so.

    By torch's FSDP2, whose hooks gather a block's weights before it runs and drop them behind it. A block goes to the
    device by itself: its whole weights are there only while it is shared out.
    """
    shared = [block for block in blocks if not isinstance(block, FSDPModule)]
    if not shared:
        return
    mesh = init_device_mesh(device.type, (ranks.everyone.size,))
    for block in shared:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
