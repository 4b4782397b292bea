"""What a kernel takes and what its inner loops cost, all from its compiled code: `cogvx-fast kernels inspect`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .._triton.choice import describe
from ..aot import Compiled, Launch
from ..targets import Target
from . import machine_code, pipes, sass
from .traffic import Traffic, traffic

TENSOR_GOAL = 0.70  # of the time the tensor cores can be busy in a matrix kernel, at least
TRAFFIC_GOAL = 1.1  # times the least bytes that a kernel bound by memory moves, at most
NO_PIPES = "the pipes of AMD's multiprocessors are not modelled: resources only"


@dataclass(frozen=True)
class LoopCost:
    """The cost of one trip of an inner loop; `address` is where it starts in the code, None for code without loops.

    Where the traffic is known, the cycles of code without loops are those of device memory, too, as "memory".
    """

    address: int | None
    cost: pipes.Cost


@dataclass(frozen=True)
class Inspection:
    """One kernel in one configuration on one target.

    Attributes:
        constants: what the kernel was compiled for: numbers such as that of channels, dtypes of its tensors, and
            arguments that are not there.
        dtype: of the first tensor.
        loops: inner loops by address; for a kernel without, its whole code once.
        traffic: of a kernel that multiplies no matrices, where its code tells.
        note: what could not be found out, and why.
    """

    kernel: str
    target: str
    configuration: str
    constants: dict[str, int | str | None]
    dtype: str
    num_warps: int
    resources: machine_code.Resources
    loops: tuple[LoopCost, ...]
    traffic: Traffic | None
    note: str | None = None

    @property
    def main_loop(self) -> LoopCost | None:
        """The loop with the most products of matrices, else the longest."""
        return max(self.loops, key=lambda loop: (loop.cost.macs, loop.cost.instructions), default=None)

    @property
    def tensor_ceiling(self) -> float | None:
        """The share of the main loop's time that the tensor cores can be busy at most; None without products."""
        return self.main_loop.cost.tensor_ceiling if self.main_loop else None

    @property
    def meets_goal(self) -> bool | None:
        """Whether the ceiling or the traffic is what a kernel should have; None where neither is known."""
        if self.tensor_ceiling is not None:
            return self.tensor_ceiling >= TENSOR_GOAL
        return None if self.traffic is None else self.traffic.over_least <= TRAFFIC_GOAL


def inspect(compiled: Compiled) -> Inspection:
    """Everything that the code of one compiled configuration tells."""
    launch, target = compiled.launch, compiled.target
    dtype = next(str(v).removeprefix("torch.") for name, v in launch.arguments.items() if name in launch.tensors)
    num_warps = machine_code.warps(compiled.kernel)
    moved = None if compiled.resources.matrix else traffic(compiled.kernel.asm["ttir"], launch.tensors)
    head = (
        launch.name,
        target.name,
        describe(compiled.config),
        _constants(launch),
        dtype,
        num_warps,
        compiled.resources,
    )
    rates = target.rates
    if rates is None:
        return Inspection(*head, (), moved, NO_PIPES)
    program = sass.parse(machine_code.disassemble(compiled.kernel))

    def priced(address: int | None, instructions: Sequence[sass.Instruction]) -> LoopCost:
        return LoopCost(address, pipes.cost(instructions, program, rates, num_warps))

    loops = [priced(loop.address, loop.instructions) for loop in sass.inner_loops(program)]
    if not loops:
        whole = priced(None, program.instructions)
        loops = [whole if moved is None else _with_memory(whole, moved, target)]
    return Inspection(*head, tuple(loops), moved)


def _constants(launch: Launch) -> dict[str, int | str | None]:
    """Numbers that are not whole, such as a norm's epsilon, change no code."""
    kept = {n: v for n, v in launch.arguments.items() if n.isupper() or v is None or isinstance(v, torch.dtype)}
    return {
        name.removesuffix("_ptr"): str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for name, value in kept.items()
        if not isinstance(value, float)
    }


def _with_memory(whole: LoopCost, moved: Traffic, target: Target) -> LoopCost:
    cycles = whole.cost.cycles | {"memory": moved.moved * moved.program / target.boards[0].bytes_per_clock}
    return LoopCost(None, dataclasses.replace(whole.cost, cycles=cycles))
