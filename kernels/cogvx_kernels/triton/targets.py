"""The GPUs that the kernels are made for, and the one place that picks a kernel's configurations for one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),  # A100
    "sm_86": GPUTarget("cuda", 86, 32),  # RTX 30, A10
    "sm_89": GPUTarget("cuda", 89, 32),  # RTX 40, L40S
    "sm_90": GPUTarget("cuda", 90, 32),  # H100, H200
    "sm_100": GPUTarget("cuda", 100, 32),  # B200
    "sm_120": GPUTarget("cuda", 120, 32),  # RTX 50
    "gfx942": GPUTarget("hip", "gfx942", 64),  # MI300
}

# Those that multiply numbers of float8_e4m3fn; the MI300 has another kind of e4m3.
E4M3_TARGETS = frozenset(("sm_89", "sm_90", "sm_100", "sm_120"))

# TRITON_INTERPRET=1, set before kernels are defined, runs them on the CPU, element by element in numpy: for tests.
INTERPRETED = bool(knobs.runtime.interpret)

Configs = Mapping[str, Sequence[triton.Config]]


def target_of(device: torch.device) -> str:
    """The name in `TARGETS` whose configurations a device uses: its own, or the nearest below it of its kind.

    Without a GPU it is sm_80: then the tensors are fake, the kernel is traced and not launched, or interpreted.

    Raises:
        ValueError: for a GPU older than any in `TARGETS`.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return "sm_80"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    own = major * 10 + minor
    below = {target.arch: name for name, target in TARGETS.items() if target.backend == "cuda" and target.arch <= own}
    if not below:
        raise ValueError(f"the Triton kernels need compute capability 8.0, {device} has {major}.{minor}")
    return below[max(below)]


def why_not_e4m3(device: torch.device) -> str | None:
    """What keeps a device from multiplying numbers of float8_e4m3fn, or None; None as well where no GPU is."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(device)
    if torch.version.hip:
        return f"{name} multiplies float8_e4m3fnuz, another type, and has no instruction for this one"
    major, minor = torch.cuda.get_device_capability(device)
    return None if (major, minor) >= (8, 9) else f"{name} has compute capability {major}.{minor}, it needs 8.9"


class TunedKernel:
    """A kernel and its short list of configurations for each target; called with a device, it gives what to launch.

    On a GPU the list is timed once for each value of the arguments in `key`; the tensors in `restore` are read as well
    as written, and get their contents back each time. What cannot be timed, because it is traced or interpreted
    without a GPU, takes the first. A kernel that a target cannot run has
    no list for it.
    """

    _made: ClassVar[list[TunedKernel]] = []

    def __init__(self, fn: triton.JITFunction, configs: Configs, key: tuple[str, ...], restore: tuple[str, ...] = ()):
        self.fn, self.configs, self.key, self.restore = fn, configs, key, restore
        self._tuners: dict[tuple[str, bool], tuple[Configs, Autotuner]] = {}
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
    def parameters(self) -> frozenset[str]:
        """The names of the kernel's arguments that a configuration sets."""
        return frozenset(name for configs in self.configs.values() for config in configs for name in config.kwargs)

    def __call__(self, device: torch.device) -> Autotuner:
        can_time = device.type == "cuda" and torch.cuda.is_available() and not INTERPRETED
        target = target_of(device)
        if not can_time and target not in self.configs:
            target = next(iter(self.configs))
        made = self._tuners.get((target, can_time))
        if made is None or made[0] is not self.configs:  # which may be replaced
            choices = list(self.configs[target])
            choices = choices if can_time else choices[:1]
            make = triton.autotune(choices, key=list(self.key), restore_value=list(self.restore) or None)
            made = self._tuners[target, can_time] = self.configs, make(self.fn)
        return made[1]


def tuned(configs: Configs, key: tuple[str, ...]) -> Callable[[triton.JITFunction], TunedKernel]:
    """Decorator that gives a kernel its configurations."""
    return lambda fn: TunedKernel(fn, configs, key)
