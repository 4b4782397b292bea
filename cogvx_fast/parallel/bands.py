"""Frames split into bands of rows, one for each process: what the autoencoder's layers ask of their neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import collectives
from .degrees import pieces
from .ranks import Axis


@dataclass(frozen=True)
class Band:
    """The rows of one process, and how it hears of the others'.

    Layers double and halve rows, so what a band is counted in is a row of the latents, of which it has whole ones at
    every resolution.

    Attributes:
        axis: the processes, from the top band to the lowest.
        units: rows of the latents of each band.
    """

    axis: Axis
    units: tuple[int, ...]

    @classmethod
    def of(cls, axis: Axis, units: int) -> Band | None:
        """The band of this process of frames with `units` rows of latents; None for one process, and where there are
        fewer rows than processes."""
        return cls(axis, tuple(pieces(units, axis.size))) if 1 < axis.size <= units else None

    def own(self, frames: torch.Tensor, dim: int) -> torch.Tensor:
        """This band of `frames`, whose rows are in `dim`."""
        each = frames.shape[dim] // sum(self.units)
        first = sum(self.units[: self.axis.index]) * each
        return frames.narrow(dim, first, self.units[self.axis.index] * each)

    def gathered(self, rows: torch.Tensor, dim: int) -> torch.Tensor:
        """All bands' rows, one below the other, at every process."""
        each = rows.shape[dim] // self.units[self.axis.index]
        return collectives.gathered(rows, dim, [units * each for units in self.units], self.axis)

    def swapped(self, top: torch.Tensor, bottom: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The row above this band and the one below, of its neighbours; None where the frame ends.

        Args:
            top, bottom: the first and the last row of this band, for them.
        """
        return collectives.swap_rows(top.contiguous(), bottom.contiguous(), self.axis)

    def statistics(self, mean: torch.Tensor, inverse: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and inverse deviation of whole frames from those of each band, all `(batch, groups)`.

        Chan, Golub and LeVeque's sum of squares of parts ("Updating formulae and a pairwise algorithm for computing
        sample variances", 1979), in double precision.

        Args:
            inverse: `1 / sqrt(variance + eps)`.
        """
        own = torch.stack([mean.double(), inverse.double().pow(-2) - eps])
        everybody = collectives.gathered(own[None], 0, [1] * self.axis.size, self.axis)  # (band, 2, batch, groups)
        weights = own.new_tensor(self.units)[:, None, None] / sum(self.units)
        means, variances = everybody.unbind(1)
        whole = (weights * means).sum(0)
        variance = (weights * (variances + (means - whole).square())).sum(0)
        return whole.to(mean.dtype), (variance + eps).rsqrt().to(inverse.dtype)
