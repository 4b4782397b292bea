"""A kernel with its configurations for each GPU, and the one place that launches it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import triton
from torch._library.custom_ops import CustomOpDef
from torch._library.triton import is_wrap_triton_enabled, triton_ops_to_kernels
from torch.library import wrap_triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner

from ..targets import Target, target_of
from . import choice

# TRITON_INTERPRET=1, set before kernels are defined, runs them on the CPU, element by element in numpy: for tests.
INTERPRETED = bool(knobs.runtime.interpret)
EVERYWHERE = "everywhere"  # the key of configurations for all families that have none of their own

Configs = Mapping[str, Sequence[triton.Config]]
Grid = tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]]
Trial = tuple[Grid, Sequence[Any]]


def gpu_target(target: Target) -> GPUTarget:
    """What triton calls a target."""
    if target.capability is None:
        return GPUTarget("hip", target.name, 64)
    major, minor = target.capability
    return GPUTarget("cuda", major * 10 + minor, 32)


class TunedKernel:
    """A kernel and its short lists of configurations.

    Attributes:
        configs: by the name of a target, else by its family, else those for `EVERYWHERE`.
        key: names of the arguments by whose values a choice is made; the size of the problem is the launch's.
        without: families that have none, and why.
    """

    _made: ClassVar[list[TunedKernel]] = []

    def __init__(
        self, fn: triton.JITFunction, configs: Configs, key: tuple[str, ...], without: Mapping[str, str] | None = None
    ):
        self.fn, self.configs, self.key, self.without = fn, configs, key, dict(without or {})
        self._tuners: dict[tuple[str, bool], tuple[Configs, Autotuner]] = {}
        self._chosen: dict[tuple, triton.Config] = {}
        self._made.append(self)

    @classmethod
    def of(cls, tuner: Autotuner) -> TunedKernel:
        """The one that gave `tuner`."""
        return next(kernel for kernel in cls._made if any(tuner is one for _, one in kernel._tuners.values()))

    @classmethod
    def all(cls) -> tuple[TunedKernel, ...]:
        """Every kernel that has been defined."""
        return tuple(cls._made)

    @property
    def name(self) -> str:
        return self.fn.__name__.removesuffix("_kernel")

    @property
    def parameters(self) -> frozenset[str]:
        """The names of the kernel's arguments that a configuration sets."""
        return frozenset(name for configs in self.configs.values() for config in configs for name in config.kwargs)

    def for_target(self, target: Target) -> Sequence[triton.Config]:
        """The configurations that can be chosen on `target`; none where it does not run the kernel."""
        names = (target.name, target.family, EVERYWHERE)
        found = next((self.configs[name] for name in names if name in self.configs), None)
        return () if found is None or target.family in self.without else found

    def choices(self, device: torch.device) -> list[triton.Config]:
        """All that can be chosen from on a GPU; without one, where a kernel is traced or interpreted, the first.

        Raises:
            ValueError: for a GPU that does not run the kernel.
        """
        target, real = target_of(device), is_real(device)
        found = list(self.for_target(target))
        if real and not found:
            raise ValueError(f"{self.name} does not run on {target.name}: {self.without.get(target.family)}")
        return found if real else (found or list(next(iter(self.configs.values()))))[:1]

    def tuner(self, device: torch.device) -> Autotuner:
        """`choices` as what a compiler of graphs takes, which times them itself."""
        key = target_of(device).name, is_real(device)
        made = self._tuners.get(key)
        if made is None or made[0] is not self.configs:  # which may be replaced
            tuner = triton.autotune(self.choices(device), key=list(self.key))(self.fn)
            made = self._tuners[key] = self.configs, tuner
        return made[1]

    def _choose(
        self, problem: choice.Problem, device: torch.device, trial: Trial | Callable[[], Trial], meta: dict[str, Any]
    ) -> triton.Config:
        """The configuration for a problem that this process has not met. While a graph is captured nothing can be
        timed: it is the first then, which is not remembered."""
        candidates = self.choices(device)
        chosen = candidates[0] if len(candidates) == 1 else choice.known(problem, candidates)
        if chosen is None:
            if torch.cuda.is_current_stream_capturing():
                return candidates[0]
            grid, arguments = trial() if callable(trial) else trial

            def run(config: triton.Config) -> None:
                self.fn[grid](*arguments, **meta, **config.all_kwargs())

            chosen = choice.time(problem, candidates, run)
        self._chosen[problem.key] = chosen
        return chosen


def tuned(configs: Configs, key: tuple[str, ...]) -> Callable[[triton.JITFunction], TunedKernel]:
    """Decorator that gives a kernel its configurations."""
    return lambda fn: TunedKernel(fn, configs, key)


def launches(*kernels: TunedKernel | triton.JITFunction) -> Callable[[CustomOpDef], CustomOpDef]:
    """Decorator that tells torch which kernels an operation launches.

    It keeps compiled graphs on disk by the sources of the kernels in them, for which it reads the source of an
    operation: behind `launch` it finds none, and would run what was compiled of a kernel that has changed since.
    """

    def tell(operation: CustomOpDef) -> CustomOpDef:
        own = [kernel.fn if isinstance(kernel, TunedKernel) else kernel for kernel in kernels]
        triton_ops_to_kernels[operation._qualname] = own
        return operation

    return tell


def is_real(device: torch.device) -> bool:
    """Whether kernels can be launched there, and timed."""
    return device.type == "cuda" and torch.cuda.is_available() and not INTERPRETED


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Within the block launches go to `device`, whichever is the current one: triton asks for that alone."""
    return torch.cuda.device(device) if is_real(device) else contextlib.nullcontext()


def launch(
    kernel: TunedKernel,
    device: torch.device,
    grid: Grid,
    *arguments: Any,
    size: int,
    trial: Callable[[], Trial] | None = None,
    **meta: Any,
) -> None:
    """Launch `kernel` on `device` in the configuration that is best there, of which a first launch times all.

    Args:
        grid: as triton takes it.
        arguments, meta: of the kernel, by position and by name.
        size: what the time depends on, tokens, rows or pixels: each power of two has a choice of its own.
        trial: makes grid and arguments to time with in the place of these, where launching twice would give another
            result.
    """
    with on_device(device):
        if is_wrap_triton_enabled() or not is_real(device):  # traced, or interpreted
            wrap_triton(kernel.tuner(device))[grid](*arguments, **meta)
            return
        problem = choice.Problem.of(kernel, device, arguments, meta, size)
        chosen = kernel._chosen.get(problem.key)
        if chosen is None:
            timed = (grid, arguments) if trial is None else trial
            chosen = kernel._choose(problem, device, timed, meta)
        kernel.fn[grid](*arguments, **meta, **chosen.all_kwargs())
