"""The step skipping of one generation: what is kept of computed steps, and what is predicted from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..state import State, adapter_settings
from .schedule import COMPUTED, HISTORY, PREDICTED, StepSchedule


@dataclass(frozen=True)
class Skipped:
    """What became of a schedule in a generation.

    Attributes:
        schedule: that was followed.
        strip: what happened at the steps, in the schedule's characters.
        why_computed: why steps were computed that the schedule predicts, in words; empty where none was.
        bytes_kept: of outputs, while the generation denoised.
    """

    schedule: StepSchedule
    strip: str
    why_computed: str
    bytes_kept: int


STEPS, OUTPUT = "skipping.steps", "skipping.output."  # names of what is carried


class StepSkipping:
    """Follows a schedule through the steps of one generation.

    The network's last two outputs lie in buffers that are made at the first step and written at every computed one, so
    that a graph of a GPU which writes over its outputs does no harm. Nothing is fetched from the device.

    Attributes:
        schedule: that is followed.
    """

    def __init__(self, schedule: StepSchedule):
        self.schedule = schedule
        self._strip = ""
        self._why_computed = ""
        self._parameters: tuple[nn.Parameter, ...] = ()
        self._weights: Any = None  # what they were at the last look
        self._buffers: list[torch.Tensor] = []
        self._steps: list[int] = []  # whose outputs the buffers hold, the newest first

    def done(self) -> Skipped:
        """What happened so far."""
        kept = sum(buffer.nbytes for buffer in self._buffers)
        return Skipped(self.schedule, self._strip, self._why_computed, kept)

    def follow(self, timesteps: torch.Tensor) -> None:
        """Take the steps that the scheduler has, if they are of another number than the schedule is of."""
        if len(timesteps) != self.schedule.steps:
            self.schedule = self.schedule.retargeted(timesteps.tolist())

    def predicted(self, step: int | None, latents: torch.Tensor) -> torch.Tensor | None:
        """The output at `step`, `(batch, frames, channels, height, width)` as the network gives it, or None where it
        has to be computed.

        Args:
            step: from 0; None where it is not one of the scheduler's.
            latents: that enter the step, `(batch, frames, channels or more, height, width)`.
        """
        if step is None:
            self._why_computed = "timesteps that are not the scheduler's"
            return None
        if not self.schedule.is_computed(step):
            if len(self._steps) < HISTORY or step <= self._steps[0]:
                self._why_computed = "the two outputs before it are not there: a later start, or something was changed"
            elif not _is_same(self._buffers[0], latents):
                self._why_computed = "latents of another size or on another device"
            else:
                self._strip += PREDICTED
                return self._extrapolated(step, latents)
        return None

    def _extrapolated(self, step: int, latents: torch.Tensor) -> torch.Tensor:
        newest, other = self._buffers
        w1, w2, w3 = self.schedule.weights_at(step, self._steps)
        # Sums of half precision are taken in fp32: the weights of the two outputs nearly cancel.
        output = newest.float() * w1
        output.add_(other.float(), alpha=w2)
        if w3:
            output.add_(latents[:, :, : newest.shape[2]].float(), alpha=w3)
        return output.to(newest.dtype)

    def computed(self, step: int | None, output: torch.Tensor) -> None:
        """Keep the output of a step that was computed."""
        self._strip += COMPUTED
        if step is None:
            return
        if not self._buffers or self._buffers[0].dtype != output.dtype or not _is_same(self._buffers[0], output):
            self._buffers = [torch.empty_like(output) for _ in range(HISTORY)]
            self._steps = []
        self._buffers.insert(0, self._buffers.pop())
        self._buffers[0].copy_(output)
        self._steps = [step, *self._steps][:HISTORY]

    def carried(self) -> dict[str, torch.Tensor]:
        """What later steps need of those so far, by name: the buffers themselves."""
        steps = torch.tensor(self._steps, dtype=torch.int64, device="cpu")
        return {STEPS: steps} | {f"{OUTPUT}{number}": buffer for number, buffer in enumerate(self._buffers)}

    def take_up(self, carried: Mapping[str, torch.Tensor]) -> None:
        """Go on with what `carried` gave in the same generation, which was parked in between; if this is its start."""
        if STEPS in carried and not self._buffers:
            count = sum(name.startswith(OUTPUT) for name in carried)
            self._buffers = [carried[f"{OUTPUT}{number}"] for number in range(count)]
            self._steps = carried[STEPS].tolist()

    def forget(self) -> None:
        """What is kept is of no use for the next step: latents, embeddings or weights were changed."""
        self._steps = []

    def look_at(self, model: nn.Module) -> None:
        """Forget what is kept if weights of `model` were written to since the last computed step, as adapters that are
        merged or set anew do. What goes around torch's count of writes, as writing to `.data`, is not seen."""
        if self._weights is not None and self._state(model) != self._weights:
            self.forget()

    def remember(self, model: nn.Module) -> None:
        """What the weights are, after a computed step: it may have laid them out anew."""
        self._parameters = tuple(model.parameters())
        self._weights = self._state(model)

    def _state(self, model: nn.Module) -> Any:
        return State.of_tensors(*self._parameters), adapter_settings(model)

    def release(self) -> None:
        self._buffers, self._steps, self._parameters, self._weights = [], [], (), None


def watched_callback(callback: Callable[..., Any], skipping: StepSkipping) -> Callable[..., Any]:
    """A `callback_on_step_end` that does what `callback` does, and has `skipping` forget if that changes something."""

    def watched(pipeline: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]) -> Any:
        given = dict(callback_kwargs)
        before = State.of_tensors(*given.values(), numbers=True)
        returned = callback(pipeline, step, timestep, callback_kwargs)
        now = {**given, **returned} if isinstance(returned, dict) else given
        if State.of_tensors(*(now[name] for name in given), numbers=True) != before:
            skipping.forget()
        return returned

    return watched


def _is_same(kept: torch.Tensor, other: torch.Tensor) -> bool:
    """Of one size and place, but for channels: a network that is shown an image takes more than it gives."""
    return (kept.shape[:2], kept.shape[3:], kept.device) == (other.shape[:2], other.shape[3:], other.device)
