"""What stays the same through one generation, computed once and kept until the generation ends.

A pipeline opens a session around diffusers' denoising loop. The transformer asks it for constants and
gets none when there is no session or when what it was called with is not what the session knows: then
it computes them itself, so a direct call is always right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..config import EngineConfig
from .modulation import Modulation


@dataclass
class EngineSession:
    """Constants of one generation.

    Attributes:
        config: which constants to keep.
        scheduler: whose `timesteps`, once set by the loop, are the steps of the modulation table.
    """

    config: EngineConfig
    scheduler: Any
    _table_key: tuple | None = None
    _table: Modulation | None = None
    _text_key: tuple | None = None
    _text: torch.Tensor | None = None
    _positions: dict[tuple, torch.Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: {"modulation": 0, "text_projection": 0, "positions": 0})

    @torch.compiler.disable
    def modulation(
        self,
        timestep: torch.Tensor,
        ofs: torch.Tensor | None,
        compute: Callable[[torch.Tensor], Modulation],
    ) -> Modulation | None:
        """The row of `timestep` in the table of all steps, or None where `timestep` is not one of the loop's.

        Which step it is, is read off the tensor's place in the scheduler's `timesteps`, of which the loop
        hands out views: no value is fetched from the device.

        Args:
            timestep: `(batch,)`, one view of a step expanded over the batch.
            ofs: the loop's `ofs` tensor, the same object at every step, or None.
            compute: makes the table from all timesteps `(steps,)`.
        """
        steps = self.scheduler.timesteps
        if not self.config.modulation_table or not isinstance(steps, torch.Tensor) or not _is_view(timestep, steps):
            return None
        index = timestep.storage_offset() - steps.storage_offset()
        key = (id(steps), _version(steps), id(ofs))
        if self._table_key != key:
            self._table = compute(steps)
            self._table_key = key
            self._kept_alive = (steps, ofs)  # while these live, no other tensor can take their ids
            self.counts["modulation"] += 1
        return self._table.row(index)

    @torch.compiler.disable
    def projected_text(
        self, encoder_hidden_states: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """`compute(encoder_hidden_states)`, kept for as long as the same unchanged tensor comes in."""
        key = (id(encoder_hidden_states), _version(encoder_hidden_states))
        if not self.config.reuse_text_projection or key[1] is None:
            return compute(encoder_hidden_states)
        if self._text_key != key:
            self._text = compute(encoder_hidden_states)
            self._text_key = key
            self._kept_text = encoder_hidden_states
            self.counts["text_projection"] += 1
        return self._text

    @torch.compiler.disable
    def positions(self, key: tuple, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`compute()`, kept under `key`: size, dtype and device of the grid."""
        if key not in self._positions:
            self._positions[key] = compute()
            self.counts["positions"] += 1
        return self._positions[key]


def _version(tensor: torch.Tensor) -> int | None:
    """How often the tensor was written to in place; None where torch does not count (inference tensors)."""
    return None if tensor.is_inference() else tensor._version


def _is_view(timestep: Any, steps: torch.Tensor) -> bool:
    return (
        isinstance(timestep, torch.Tensor)
        and timestep.ndim == 1
        and (timestep.stride(0) == 0 or timestep.numel() == 1)
        and timestep.dtype == steps.dtype
        and steps.ndim == 1
        and steps.is_contiguous()
        and not steps.is_inference()
        and timestep.untyped_storage().data_ptr() == steps.untyped_storage().data_ptr()
        and 0 <= timestep.storage_offset() - steps.storage_offset() < len(steps)
    )
