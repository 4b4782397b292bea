"""Compile the Triton kernels for named GPUs without one, and report what the machine code needs.

What is compiled is what is launched: an operation is traced over fake CUDA tensors, and each launch found is compiled
through triton's own run-time path, so that a kernel lands in triton's cache under the key that a GPU machine with the
same versions looks up when it calls the operation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_functional
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import MockTensor

from .._triton.choice import describe
from .._triton.tuned import TunedKernel, gpu_target
from ..inspect import machine_code
from ..targets import TARGETS, Target

# Aten operations and Python's own that launch nothing: views, and memory for a kernel to write.
_FREE = frozenset(
    [
        "alias",
        "detach",
        "empty",
        "empty_like",
        "getitem",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "t",
        "transpose",
        "unbind",
        "view",
    ]
)


class _NoDevice:
    """Stands in for triton's driver: names a GPU, and has none."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target.arch)  # a kernel keeps what it compiled by device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def pretend(target: Target) -> Iterator[None]:
    """Within the block Triton takes this machine for one with such a GPU; nothing can be launched."""
    before = driver._active  # asking for `driver.active` would look for a GPU
    driver.set_active(_NoDevice(gpu_target(target)))
    try:
        yield
    finally:
        driver.set_active(before)


@dataclass(frozen=True)
class Launch:
    """A kernel and what it is called with, dtypes in the place of tensors; the configuration is not among them.

    `tensors`: shape, and bytes of an element, of each tensor that it was traced with.
    """

    kernel: TunedKernel
    arguments: dict[str, Any]
    tensors: dict[str, tuple[tuple[int, ...], int]]

    @property
    def name(self) -> str:
        return self.kernel.name

    def configs(self, target: Target) -> Sequence[triton.Config]:
        """The configurations that can be chosen on `target`; none where it lacks the kernel or one of its dtypes."""
        if torch.float8_e4m3fn in self.arguments.values() and not target.e4m3:
            return ()
        return self.kernel.for_target(target)


@dataclass(frozen=True)
class Compiled:
    """One launch in one configuration for one target, and what its machine code takes."""

    launch: Launch
    target: Target
    config: triton.Config
    kernel: CompiledKernel
    resources: machine_code.Resources

    def __str__(self) -> str:
        return f"{self.launch.name} {self.target.name} {describe(self.config)}"


def trace(function: Callable, *arguments: Any) -> torch.fx.Graph:
    """The graph of `function` over fake tensors with Triton launches and aten operations in it, as inductor sees it."""
    # Which GPU does not matter, as long as it has every dtype.
    with pretend(next(target for target in TARGETS.values() if target.e4m3)), torch.no_grad():
        return make_fx(dispatch_functionalize(function), tracing_mode="fake")(*arguments).graph


def launches(function: Callable, *arguments: Any) -> list[Launch]:
    """Every Triton launch of `function` called with CUDA tensors of one `FakeTensorMode`, in order."""
    return [
        _launch(node.kwargs)
        for node in trace(function, *arguments).nodes
        if node.target is triton_kernel_wrapper_functional
    ]


def kernel_names(graph: torch.fx.Graph) -> list[str]:
    """What a graph of `trace` launches on the device, in order: Triton kernels and aten operations by name."""
    calls = (node for node in graph.nodes if node.op == "call_function")
    named = (_launch(node.kwargs).name if "kernel_idx" in node.kwargs else _operation(node.target) for node in calls)
    return [name for name in named if name not in _FREE]


def _operation(target: Callable) -> str:
    return target.__name__.split(".")[0]


def _launch(call: dict[str, Any]) -> Launch:
    kernel = TunedKernel.of(kernel_side_table.get_kernel(call["kernel_idx"]))
    given = call["kwargs"] | kernel_side_table.get_constant_args(call["constant_args_idx"])
    fakes = {name: value.meta["val"] for name, value in given.items() if hasattr(value, "meta")}
    values = given | {name: fake.dtype for name, fake in fakes.items()}
    values = {name: values.get(name) for name in kernel.fn.arg_names if name not in kernel.parameters}
    return Launch(kernel, values, {name: (tuple(fake.shape), fake.element_size()) for name, fake in fakes.items()})


def compile_for(launch: Launch, target: Target, config: triton.Config) -> Compiled:
    """Compile one configuration; what was compiled before comes from triton's cache."""
    arguments = {
        name: MockTensor(value) if isinstance(value, torch.dtype) else value for name, value in launch.arguments.items()
    }
    with pretend(target):
        kernel = launch.kernel.fn.warmup(**arguments, **config.all_kwargs(), grid=(1,))
    return Compiled(launch, target, config, kernel, machine_code.read(kernel, target))


def compile_all(launch: Launch, targets: Sequence[Target] | None = None, first_only: bool = False) -> list[Compiled]:
    """The configurations that can be chosen on `targets` (all), or the one that is listed first for each; none on a
    target that does not run the kernel."""
    return [
        compile_for(launch, target, config)
        for target in targets or TARGETS.values()
        for config in launch.configs(target)[: 1 if first_only else None]
    ]
