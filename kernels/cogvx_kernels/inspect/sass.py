"""Nvidia's machine code as nvdisasm prints it: instructions, and the loops among them.

Loops are the natural loops of the control flow graph (a branch back to a block that dominates it), not every branch
backwards: code that waits for a barrier is put behind the kernel and jumps back from there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_SECTION = re.compile(r"^\s*\.section\s+\.text\.")
_LABEL = re.compile(r"^(\.L_[\w$]+|[\w$.]+):\s*$")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\(([^)]+)\)")
_PREDICATE = re.compile(r"(?<![\w.])!?U?P(?:\d|T)\b")
# A call of a label inside the kernel is a jump that may come back.
_BRANCHES = frozenset(["BRA", "BRX", "JMP", "CALL"])
# With one of these a loop waits for other threads or copies; how often it runs says nothing about the kernel's work.
_WAITS = frozenset(["SYNCS", "UTCATOMSWS", "NANOSLEEP"])
_LONGEST_WAIT = 24  # instructions


@dataclass(frozen=True)
class Instruction:
    """One instruction: its address, "@P0" or None, the opcode with its modifiers, the operands as text."""

    address: int
    guard: str | None
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without modifiers: FFMA, HMMA."""
        return self.opcode.split(".")[0]

    @property
    def runs(self) -> bool:
        """Whether it does anything: compilers pad with instructions whose predicate is false."""
        return self.guard not in ("@!PT", "@!UPT")


@dataclass(frozen=True)
class Loop:
    """A natural loop: the address of its first block, and its instructions in the order of their addresses."""

    address: int
    instructions: tuple[Instruction, ...]

    @property
    def waits(self) -> bool:
        return len(self.instructions) <= _LONGEST_WAIT and any(i.name in _WAITS for i in self.instructions)


@dataclass(frozen=True)
class Program:
    """The code of one kernel; `labels` gives the index of the instruction that each label stands before."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    def constant(self, register: str, before: Instruction) -> int | None:
        """What a uniform register holds where the last write to it before an instruction moved a constant there."""
        value = None
        for instruction in self.instructions:
            if instruction.address >= before.address:
                break
            if re.match(rf"{register}\b(?!\.)", instruction.operands):
                constant = re.fullmatch(rf"{register}, (0x[0-9a-f]+)", instruction.operands)
                value = int(constant[1], 16) if constant and instruction.name == "UMOV" else None
        return value


def parse(text: str) -> Program:
    """The program in the output of `nvdisasm -c` for a cubin with one kernel.

    Raises:
        ValueError: if there is no instruction in it.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if _SECTION.match(line) and instructions:
            raise ValueError("more than one kernel in the machine code")
        if found := _INSTRUCTION.match(line):
            address, guard, opcode, operands = found.groups()
            instructions.append(Instruction(int(address, 16), guard, opcode, operands))
        elif found := _LABEL.match(line):
            labels[found[1]] = len(instructions)
    if not instructions:
        raise ValueError("no instructions in the machine code")
    return Program(tuple(instructions), labels)


def inner_loops(program: Program) -> list[Loop]:
    """The loops that hold no other loop, by address; loops that only wait are no loops here."""
    loops = [loop for loop in _natural_loops(program) if not loop.waits]
    addresses = {loop.address: {i.address for i in loop.instructions} for loop in loops}

    def holds(outer: Loop, inner: Loop) -> bool:
        return outer is not inner and addresses[inner.address] < addresses[outer.address]

    return [loop for loop in loops if not any(holds(loop, other) for other in loops)]


def _natural_loops(program: Program) -> list[Loop]:
    starts, successors = _blocks(program)
    dominators = _dominators(successors)
    predecessors: dict[int, list[int]] = {block: [] for block in dominators}
    for block in dominators:
        for following in successors[block]:
            predecessors[following].append(block)
    bodies: dict[int, set[int]] = {}
    for block in dominators:
        for header in successors[block]:
            if header in dominators[block]:
                body = bodies.setdefault(header, {header})
                reached = [block]
                while reached:
                    member = reached.pop()
                    if member not in body:
                        body.add(member)
                        reached += predecessors[member]
    found = []
    for header, body in sorted(bodies.items()):
        members = [i for block in sorted(body) for i in program.instructions[starts[block] : starts[block + 1]]]
        if any(i.name not in ("BRA", "NOP") for i in members):  # a branch to itself stands behind every kernel
            found.append(Loop(program.instructions[starts[header]].address, tuple(members)))
    return found


def _blocks(program: Program) -> tuple[list[int], list[list[int]]]:
    """Where each basic block starts (and where the last ends), and which blocks follow it."""
    instructions, size = program.instructions, len(program.instructions)
    cuts = {0, size, *(index for index in program.labels.values() if index < size)}
    cuts.update(index + 1 for index, i in enumerate(instructions) if i.name in _BRANCHES or _ends(i))
    starts = sorted(cuts)
    number = {start: block for block, start in enumerate(starts[:-1])}
    successors = []
    for block, end in enumerate(starts[1:]):
        last = instructions[end - 1]
        target = _TARGET.search(last.operands) if last.name in _BRANCHES else None
        following = [number[program.labels[target[1]]]] if target and program.labels.get(target[1], size) < size else []
        if end < size and not (_ends(last) or (last.name in _BRANCHES and _is_certain(last))):
            following.append(block + 1)
        successors.append(following)
    return starts, successors


def _ends(instruction: Instruction) -> bool:
    return instruction.name in ("EXIT", "RET") and _is_certain(instruction)


def _is_certain(instruction: Instruction) -> bool:
    """Whether a branch is always taken: no predicate stands before it or among its operands."""
    operands = _TARGET.sub("", instruction.operands)
    predicates = [p for p in _PREDICATE.findall(operands) if p not in ("PT", "UPT")]
    returns = instruction.name == "CALL" or ".DIV" in instruction.opcode
    return instruction.guard in (None, "@PT") and not predicates and not returns


def _dominators(successors: Sequence[Sequence[int]]) -> dict[int, set[int]]:
    """For each block that can be reached, the blocks that every way to it goes through."""
    reachable, reached = {0}, [0]
    while reached:
        for following in successors[reached.pop()]:
            if following not in reachable:
                reachable.add(following)
                reached.append(following)
    predecessors = {block: [p for p in reachable if block in successors[p]] for block in reachable}
    dominators = {block: set(reachable) for block in reachable} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in sorted(reachable - {0}):
            common = set.intersection(*(dominators[p] for p in predecessors[block])) | {block}
            if common != dominators[block]:
                dominators[block], changed = common, True
    return dominators
