"""The formulas in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..precision import wide


def group_norm_statistics(x: torch.Tensor, groups: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """GroupNorm's mean and `1 / sqrt(variance + eps)` (Wu and He 2018), each `(batch, groups)`, over all frames.

    Frame by frame, since the wide copy of one is all that there should be; what the frames give is joined as in
    Chan, Golub and LeVeque 1979: a mean of means, and their own spread added to the mean variance.
    """
    variances, means = [], []
    for frame in x.unbind(1):
        variance, mean = torch.var_mean(wide(frame).unflatten(-1, (groups, -1)), dim=(1, 2, 4), correction=0)
        variances.append(variance)
        means.append(mean)
    spread, mean = torch.var_mean(torch.stack(means), dim=0, correction=0)
    return mean, torch.rsqrt(torch.stack(variances).mean(0) + spread + eps)


def group_norm_modulate_silu(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    frames: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """`out = silu(x * scale[f, r, c] + shift[f, r, c])`, the tables of low resolution read at each axis' own index."""
    for t, frame in enumerate(frames.tolist()):
        offset, factor = (table[:, frame].index_select(1, rows).index_select(2, columns) for table in (shift, scale))
        out[:, t] = F.silu(torch.addcmul(offset, wide(x[:, t]), factor)).to(x.dtype)
