"""What stays the same through one generation, computed once and kept until the generation ends.

A pipeline opens a session around diffusers' denoising loop. The transformer asks it for constants and
gets none when there is no session or when what it was called with is not what the session knows: then
it computes them itself, so a direct call is always right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..attention.backends import Capability
from ..config import EngineConfig
from .modulation import Modulation
from .plan import BlockPlan, plan_blocks


@dataclass(frozen=True)
class _Kept:
    """A value and the tensors it was computed from: they stay alive with it, so `is` cannot mistake another for one."""

    value: Any
    tensors: tuple[torch.Tensor | None, ...]
    versions: tuple[int | None, ...]

    @classmethod
    def of(cls, value: Any, *tensors: torch.Tensor | None) -> _Kept:
        return cls(value, tensors, tuple(map(_version, tensors)))

    def was_made_from(self, *tensors: torch.Tensor | None) -> bool:
        same = all(kept is given for kept, given in zip(self.tensors, tensors, strict=True))
        return same and self.versions == tuple(map(_version, tensors))


@dataclass
class EngineSession:
    """Constants of one generation.

    Attributes:
        config: which constants to keep.
        scheduler: whose `timesteps`, once set by the loop, are the steps of the modulation table.
        compiles: what of the transformer runs compiled: "off", "blocks" or "full".
        fallback: what redoes a step whose result is not finite, where the backend of attention is a lossy one that can
            overflow; None: steps are not looked at.
        guard: int32 of one element on the device, where attention itself says so; None: the step's result is looked at.
        redone: how many steps were.
        counts: how often each constant was computed.
    """

    config: EngineConfig
    scheduler: Any
    compiles: str = "off"
    fallback: Capability | None = None
    guard: torch.Tensor | None = None
    redone: int = 0
    counts: dict[str, int] = field(
        default_factory=lambda: {"modulation": 0, "text_projection": 0, "positions": 0, "plans": 0}
    )
    block_plans: list[BlockPlan] = field(default_factory=list)
    _table: _Kept | None = None
    _text: _Kept | None = None
    _positions: dict[tuple, torch.Tensor] = field(default_factory=dict)

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
        if self._table is None or not self._table.was_made_from(steps, ofs):
            self._table = _Kept.of(compute(steps), steps, ofs)
            self.counts["modulation"] += 1
        return self._table.value.row(timestep.storage_offset() - steps.storage_offset())

    @torch.compiler.disable
    def projected_text(
        self, encoder_hidden_states: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """`compute(encoder_hidden_states)`, kept for as long as the same unchanged tensor comes in."""
        if not self.config.reuse_text_projection or encoder_hidden_states.is_inference():
            return compute(encoder_hidden_states)
        if self._text is None or not self._text.was_made_from(encoder_hidden_states):
            self._text = _Kept.of(compute(encoder_hidden_states), encoder_hidden_states)
            self.counts["text_projection"] += 1
        return self._text.value

    @torch.compiler.disable
    def positions(self, key: tuple, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`compute()`, kept under `key`: size, dtype and device of the grid."""
        if key not in self._positions:
            self._positions[key] = compute()
            self.counts["positions"] += 1
        return self._positions[key]

    @torch.compiler.disable
    def plans(self, blocks: Sequence[nn.Module], rows: int) -> list[BlockPlan]:
        """How each block runs, decided at the first call and again if a block's linears were replaced since."""
        current = len(self.block_plans) == len(blocks) and all(
            plan.is_current(block) for plan, block in zip(self.block_plans, blocks, strict=True)
        )
        if not current:
            self.block_plans = plan_blocks(blocks, self.config, rows, self.compiles != "off")
            self.counts["plans"] += 1
        return self.block_plans

    def release(self) -> None:
        """Forget all that is kept: the steps are done, and what comes next may need the memory."""
        self.block_plans, self._table, self._text = [], None, None
        self._positions.clear()


def _version(tensor: torch.Tensor | None) -> int | None:
    """How often the tensor was written to in place; None where torch does not count (inference tensors)."""
    return None if tensor is None or tensor.is_inference() else tensor._version


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
