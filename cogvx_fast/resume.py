"""A generation that can be parked between two steps and gone on with later, elsewhere, to the same bits.

diffusers' loop is not copied. For the call a stand-in takes the scheduler's place, of a subclass of its class: the loop
asks it for its timesteps and gets only those that are left, while step sizes stay those of all. It sees every step's
result, puts back what the loop forgets at its start (the prediction that DPM looks back at, and at which timestep) and
sets the generators where they were.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

from . import threads
from .files import write_whole
from .generation import lock_of
from .hooks import unwrapped
from .session import current

_FORMAT = "cogvx_fast.parked.1"
_CARRIED = "carried."


@dataclass(frozen=True)
class Parked:
    """A generation between two steps. Tensors are on the CPU.

    Attributes:
        done: steps that were made.
        total: of the whole generation.
        latents: `(batch, time, channels, height, width)`, as the next step takes them.
        generators: the state of the generator of each clip, uint8.
        threads: of a CPU that its steps were made with.
        made_by: scheduler, number of steps and seeds, which what goes on with it must share.
        history: the prediction that DPM looks back at, in the shape of the latents; None: there is none.
        carried: what steps that are left out are predicted from, see `StepSkipping.carried`.
    """

    done: int
    total: int
    latents: torch.Tensor
    generators: tuple[torch.Tensor, ...]
    threads: int
    made_by: Mapping[str, Any]
    history: torch.Tensor | None = None
    carried: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write it to `path`, a safetensors file with the rest as JSON in its header; whole or not at all.

        Raises:
            OSError: if it cannot be written; what was there before stays as it was.
        """
        tensors = {"latents": self.latents}
        tensors |= {f"generator.{number}": state for number, state in enumerate(self.generators)}
        tensors |= {_CARRIED + name: tensor for name, tensor in self.carried.items()}
        if self.history is not None:
            tensors["history"] = self.history
        rest = {"done": self.done, "total": self.total, "threads": self.threads, "made_by": dict(self.made_by)}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_whole(path, safetensors.torch.save(tensors, {"format": _FORMAT, "rest": json.dumps(rest)}))

    @classmethod
    def load(cls, path: str | Path) -> Parked:
        """What `save` wrote.

        Raises:
            OSError: if it cannot be read.
            ValueError: if it is something else.
        """
        try:
            with safetensors.safe_open(path, "pt") as file:
                metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except safetensors.SafetensorError as error:
            raise ValueError(f"{str(path)!r} is no parked generation: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{str(path)!r} is no parked generation: its format is {metadata.get('format')!r}")
        count = sum(name.startswith("generator.") for name in tensors)
        return cls(
            **json.loads(metadata["rest"]),
            latents=tensors["latents"],
            generators=tuple(tensors[f"generator.{number}"] for number in range(count)),
            history=tensors.get("history"),
            carried={name.removeprefix(_CARRIED): t for name, t in tensors.items() if name.startswith(_CARRIED)},
        )


@dataclass(frozen=True)
class Step:
    """What is known when a step was made: so many of `total` are `done`.

    Attributes:
        latents: as the next step takes them, where they were computed.
        prediction: of the latents at the end, as of this step; without noise, so for pictures on the way.
    """

    done: int
    total: int
    latents: torch.Tensor
    prediction: torch.Tensor


class ResumableGeneration:
    """One generation of a fast pipeline, up to its latents.

    Args:
        pipe: a fast pipeline, which one generation at a time runs on.
        seeds: of the noise, one for each clip.
        arguments: of the pipeline's call. Not those that this class gives it: `generator`, `latents`, `output_type`,
            `return_dict`, and callbacks.
        scheduler: in the place of the pipeline's own; None: that.
        parked: where to go on; None: at the start. The other arguments must be those that it was made with.

    Raises:
        TypeError: for a scheduler that keeps more from step to step than those of the family do.
        ValueError: for a `parked` of another generation, and for arguments that this class gives.
    """

    def __init__(
        self,
        pipe: Any,
        seeds: Sequence[int],
        arguments: Mapping[str, Any],
        scheduler: Any = None,
        parked: Parked | None = None,
    ) -> None:
        own = {"generator", "latents", "output_type", "return_dict", "callback_on_step_end"}
        if not own.isdisjoint(arguments):
            raise ValueError(f"a resumable generation gives {', '.join(sorted(own & arguments.keys()))} itself")
        self._pipe, self._arguments, self._seeds = pipe, dict(arguments), tuple(seeds)
        self._scheduler = pipe.scheduler if scheduler is None else scheduler
        if not isinstance(self._scheduler, CogVideoXDDIMScheduler | CogVideoXDPMScheduler):
            raise TypeError(
                f"scheduler is a {type(self._scheduler).__name__}, which cannot be parked; allowed:"
                " CogVideoXDDIMScheduler, CogVideoXDPMScheduler"
            )
        kind = "dpm" if isinstance(self._scheduler, CogVideoXDPMScheduler) else "ddim"
        steps = self._arguments.get("num_inference_steps", 50)
        self._made_by = {"scheduler": kind, "num_inference_steps": steps, "seeds": list(self._seeds)}
        if parked is not None and dict(parked.made_by) != self._made_by:
            raise ValueError(f"parked is of {dict(parked.made_by)}, not of {self._made_by}")
        self._parked = parked

    @property
    def parked(self) -> Parked | None:
        """Where it stands: after the step at which it was stopped, or after the last; None before the first."""
        return self._parked

    def run(self, after_step: Callable[[Step], bool] | None = None) -> torch.Tensor | None:
        """Make the steps that are left.

        Args:
            after_step: called after each; True parks the generation there. It may call `take`.

        Returns:
            Latents, as the pipeline returns them with `output_type="latent"`; None: it was parked.
        """
        before, device = self._parked, self._pipe._execution_device
        if before is not None and before.done == before.total:
            return before.latents.to(device)
        self._threads = torch.get_num_threads() if before is None else before.threads
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in self._seeds]
        running = self._running = _stand_in(self._scheduler, self, generators, after_step)
        with lock_of(self._pipe), threads.fixed(self._threads):
            given = dict(self._arguments)
            if before is not None and "strength" in inspect.signature(self._pipe.__call__).parameters:
                given.pop("video", None)  # the latents are in its place
            place = self._pipe.__dict__  # what is set otherwise diffusers also writes into the pipeline's configuration
            own, place["scheduler"] = place["scheduler"], running
            try:
                made = self._pipe(
                    **given,
                    latents=None if before is None else before.latents.to(device),
                    generator=generators if len(generators) > 1 else generators[0],
                    output_type="latent",
                ).frames
            finally:
                place["scheduler"] = own
        return None if running.stopped else made

    def take(self) -> Parked:
        """The generation after the step that was just made, for `after_step`. Its tensors are copied to the CPU."""
        running, session = self._running, current(unwrapped(self._pipe.transformer))
        assert session is not None and running.latents is not None
        carried = {} if session.skipping is None else session.skipping.carried()
        return Parked(
            done=running.done,
            total=running.total,
            latents=_copied(running.latents),
            generators=tuple(generator.get_state() for generator in running.generators),
            threads=self._threads,
            made_by=self._made_by,
            history=None if running.history is None else _copied(running.history),
            carried={name: _copied(tensor) for name, tensor in carried.items()},
        )

    def _begin(self) -> None:
        """In the loop, before its first step."""
        before, session = self._parked, current(unwrapped(self._pipe.transformer))
        if before is not None and session is not None and session.skipping is not None:
            device = self._pipe._execution_device
            # Copies: they are written over, and what is parked may be gone on with again.
            session.skipping.take_up({name: tensor.to(device, copy=True) for name, tensor in before.carried.items()})

    def _stop(self) -> None:
        """In the loop, after a step: it makes no other, and its time as a generation ends."""
        self._parked = self.take()
        self._pipe._interrupt = True


class _StandIn:
    """Stands before a scheduler's class, for one call of a pipeline; see the module.

    Attributes:
        all_timesteps: those of the whole generation; `timesteps` is what is left of them.
        done, total: steps of the whole generation.
        latents: of the last step that was made, as the loop takes them on.
        history: the prediction of the last step, for schedulers that look back.
        stopped: whether `after_step` ended it.
    """

    generation: ResumableGeneration
    generators: list[torch.Generator]
    after_step: Callable[[Step], bool] | None
    all_timesteps: torch.Tensor
    done: int
    total: int
    latents: torch.Tensor | None
    history: torch.Tensor | None
    stopped: bool

    def leave_out_what_is_done(self) -> None:
        """After `set_timesteps`."""
        self.all_timesteps: torch.Tensor = self.timesteps  # type: ignore[has-type]  # of the class that it stands before
        self.timesteps = self.all_timesteps[self.done :]
        self.generation._begin()

    def before_step(self, arguments: dict[str, Any]) -> None:
        """Put back what a step needs of the one before, where that was made in another call."""
        if self.total:
            return
        before = self.generation._parked
        self.total = self.done + self.generation._pipe.num_timesteps
        if before is None:
            return
        # Not at the start of the call: before the first step an image is encoded, which draws from them, too.
        for generator, state in zip(self.generators, before.generators, strict=True):
            generator.set_state(state)
        if before.history is not None:
            timestep = arguments["timestep"]
            position = timestep.storage_offset() - self.all_timesteps.storage_offset()
            arguments["old_pred_original_sample"] = before.history.to(timestep.device)
            arguments["timestep_back"] = self.all_timesteps[position - 1]

    def after(self, arguments: dict[str, Any], results: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Note what a step made."""
        sample, prediction = results
        self.done += 1
        self.latents = sample.to(arguments["sample"].dtype)  # the loop's own cast
        self.history = prediction if isinstance(self, CogVideoXDPMScheduler) else None
        if self.after_step is not None and self.after_step(Step(self.done, self.total, self.latents, prediction)):
            self.generation._stop()
            self.stopped = True


def _stand_in(
    scheduler: Any,
    generation: ResumableGeneration,
    generators: list[torch.Generator],
    after_step: Callable[[Step], bool] | None,
) -> Any:
    made = copy.copy(scheduler)
    kind: Any = type(scheduler)
    made.__class__ = _class_for(kind)
    before = generation.parked
    made.generation, made.generators, made.after_step = generation, generators, after_step
    made.done, made.total, made.latents, made.history = 0 if before is None else before.done, 0, None, None
    made.stopped = False
    return made


@functools.cache
def _class_for(scheduler: Any) -> type:
    """The subclass of a scheduler's class that stands in its place: with its name, as a schedule of steps is of a
    class by name, and with its signatures, which pipelines look at."""
    signature = inspect.signature(scheduler.step)

    @functools.wraps(scheduler.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        scheduler.set_timesteps(self, *args, **kwargs)
        self.leave_out_what_is_done()

    @functools.wraps(scheduler.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(self, *args, **kwargs).arguments
        self.before_step(arguments)
        results = scheduler.step(**arguments)
        self.after(arguments, results)
        return results

    members = {"set_timesteps": set_timesteps, "step": step, "__module__": __name__}
    return type(scheduler.__name__, (_StandIn, scheduler), members)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)
