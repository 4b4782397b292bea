"""The session of one generation: its plan, and what stays the same through it, computed once and kept until it ends.

A pipeline opens a session around diffusers' denoising loop. Models find it through a context variable, so that nothing
of a generation lies on them: threads that share weights do not see each other's. What is called without a session, or
with something that a session does not know, computes all by itself: a direct call is always right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import devices
from .parallel.ranks import Ranks
from .plan import EnginePlan
from .state import State
from .turbo.skipping import Skipped, StepSkipping

if TYPE_CHECKING:
    from .transformer.binding import BlockRan, BoundBlock
    from .transformer.modulation import Modulation

_CURRENT: ContextVar[EngineSession | None] = ContextVar("cogvx_fast_session", default=None)


def current(model: nn.Module) -> EngineSession | None:
    """The running generation whose transformer or autoencoder is `model`; None where there is none.

    Under `torch.compile` of a whole model there is none either: what is kept is no tensor code.
    """
    if torch.compiler.is_compiling():
        return None
    session = _CURRENT.get()
    return session if session is not None and model in (session.transformer, session.vae) else None


def bound_to(module: nn.Module) -> BoundBlock | None:
    """How the running generation computes a block, or the attention of one; None where there is none, or no plan."""
    if torch.compiler.is_compiling():
        return None
    session = _CURRENT.get()
    return None if session is None or torch.is_grad_enabled() else session.bindings.get(module)


@dataclass(frozen=True)
class _Kept:
    """A value, and the state of what it was computed from."""

    value: Any
    state: State | tuple[State, ...]


@dataclass
class Ran:
    """What really ran, counted while it does.

    Attributes:
        steps: forward passes of the transformer, by our formula or diffusers'.
        fast: those by ours.
        why_diffusers: why the others were not, in words.
        blocks: how each ran at the last fast step.
        ignored_default: diffusers' own default of a backend for attention, which no model of this family follows.
        redone: steps that were redone, as their attention overflowed.
        counts: how often each constant was computed.
        vae_entered: whether our autoencoder was called.
        vae_why_diffusers: why diffusers' own code ran in it, in words; empty where ours did.
        skipped: which steps were computed and which predicted; None: all are computed.
        latents: shape `(batch, channels, time, height, width)` of what was decoded last; empty for nothing.
        threads: of a CPU that it took; None: as many as torch was set to.
        why_threads: why not more, in words; empty for all.
        why_whole: of several processes, why a part was computed whole by each of them, by the part.
    """

    steps: int = 0
    fast: int = 0
    why_diffusers: str = ""
    blocks: tuple[BlockRan, ...] = ()
    ignored_default: str = ""
    redone: int = 0
    counts: dict[str, int] = field(
        default_factory=lambda: {"modulation": 0, "text_projection": 0, "positions": 0, "bindings": 0}
    )
    vae_entered: bool = False
    vae_why_diffusers: str = ""
    skipped: Skipped | None = None
    latents: tuple[int, ...] = ()
    threads: int | None = None
    why_threads: str = ""
    why_whole: dict[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class EngineSession:
    """One generation.

    Attributes:
        transformer, vae: whose generation it is; None: the pipeline has none.
        scheduler: whose `timesteps`, once set by the loop, are the steps of the modulation table. Where the loop is to
            do only the last of them, its `all_timesteps` are: the table, and so its bits, are those of the whole.
        watched: whether somebody may write to weights and embeddings between two steps, as a callback can.
        bindings: by block, and by the attention of each, how it runs.
        skipping: what is kept of computed steps for those that are not; None: all are computed.
        guard: int32 of one element on the device, which attention in 8 bits sets where it overflows; None: nobody does,
            the step's result is looked at.
        ranks: the place of this process among those that make the clip together; None: it makes it alone.
        on_step: is told the transformer's input and output after each forward pass; None: nobody wants them.
    """

    plan: EnginePlan
    transformer: nn.Module | None = None
    vae: nn.Module | None = None
    scheduler: Any = None
    watched: bool = True
    ran: Ran = field(default_factory=Ran)
    bindings: dict[nn.Module, BoundBlock] = field(default_factory=dict)
    guard: torch.Tensor | None = None
    skipping: StepSkipping | None = None
    ranks: Ranks | None = None
    on_step: Callable[[torch.Tensor, torch.Tensor], None] | None = None
    _modulation: _Kept | None = None
    _text: _Kept | None = None
    _own_samples: tuple[torch.Tensor, int, torch.Tensor] | None = None
    _positions: dict[tuple, _Kept] = field(default_factory=dict)

    @contextlib.contextmanager
    def active(self) -> Iterator[EngineSession]:
        """Within the block, models of this session find it, and its GPU is torch's current one."""
        token = _CURRENT.set(self)
        try:
            with devices.current(self.plan.device):
                yield self
        finally:
            _CURRENT.reset(token)
            self.on_step = None
            self.release()

    def step_of(self, timestep: Any) -> int | None:
        """The number of the denoising step that `timestep` is, from 0; None where it is not one of the loop's.

        It is read off the tensor's place in the scheduler's `timesteps`, of which the loop hands out views: no value is
        fetched from the device.

        Args:
            timestep: `(batch,)`, one view of a step expanded over the batch.
        """
        steps = self.timesteps
        if not isinstance(steps, torch.Tensor) or not _is_view(timestep, steps):
            return None
        return timestep.storage_offset() - steps.storage_offset()

    def modulation(
        self,
        step: int,
        ofs: torch.Tensor | None,
        modules: Sequence[nn.Module],
        compute: Callable[[torch.Tensor], Modulation],
    ) -> Modulation:
        """The row of a step in the table of all steps.

        Args:
            ofs: the loop's `ofs` tensor, the same object at every step, or None.
            modules: that the table is computed with.
            compute: makes the table from all timesteps `(steps,)`.
        """
        steps = self.timesteps
        state = State.of(*modules, numbers=self.watched), State.of_tensors(steps, ofs, numbers=self.watched)
        if self._modulation is None or self._modulation.state != state:
            self._modulation = _Kept(compute(steps), state)
            self.ran.counts["modulation"] += 1
        return self._modulation.value.row(step)

    def projected_text(self, encoder_hidden_states: torch.Tensor, projection: nn.Module) -> torch.Tensor:
        """`projection(encoder_hidden_states)`, kept for as long as both are the same and unchanged."""
        unseen = encoder_hidden_states.is_inference() and encoder_hidden_states.device.type != "cpu"
        if not self.plan.keeps_text or (self.watched and unseen):
            return projection(encoder_hidden_states)
        text = State.of_tensors(encoder_hidden_states, numbers=self.watched)
        state = State.of(projection, numbers=self.watched), text
        if self._text is None or self._text.state != state:
            self._text = _Kept(projection(encoder_hidden_states), state)
            self.ran.counts["text_projection"] += 1
        return self._text.value

    def positions(self, key: tuple, table: torch.Tensor | None, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`compute()`, kept under `key`: size, dtype and device of the grid; and for as long as the model's own `table`
        is unchanged."""
        state = State.of_tensors(table, numbers=self.watched)
        if key not in self._positions or self._positions[key].state != state:
            self._positions[key] = _Kept(compute(), state)
            self.ran.counts["positions"] += 1
        return self._positions[key].value

    def own_samples(self, embeddings: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """`embeddings[first:last]`, the same tensor for as long as `embeddings` is: what is kept of it stays valid."""
        kept = self._own_samples
        if kept is None or kept[0] is not embeddings or kept[1] != first:
            kept = self._own_samples = embeddings, first, embeddings[first:last]
        return kept[2]

    def release(self) -> None:
        """Forget all that is kept: the steps are done, and what comes next may need the memory."""
        if self.skipping is not None:
            self.skipping.release()
        self.bindings, self.guard, self._modulation, self._text = {}, None, None, None
        self._own_samples = None
        self._positions.clear()

    @property
    def timesteps(self) -> Any:
        """The scheduler's, of the whole generation, whichever of them its loop does."""
        return getattr(self.scheduler, "all_timesteps", getattr(self.scheduler, "timesteps", None))


def _is_view(timestep: Any, steps: torch.Tensor) -> bool:
    return (
        isinstance(timestep, torch.Tensor)
        and timestep.ndim == 1
        and (timestep.stride(0) == 0 or timestep.numel() == 1)
        and timestep.dtype == steps.dtype
        and steps.ndim == 1
        and steps.is_contiguous()
        and timestep.untyped_storage().data_ptr() == steps.untyped_storage().data_ptr()
        and 0 <= timestep.storage_offset() - steps.storage_offset() < len(steps)
    )
