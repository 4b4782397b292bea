"""What instructions cost the pipes of an Nvidia multiprocessor: published rates, and cycles counted with them.

The rates, with their sources, are in `targets.py`. Which pipe an instruction takes: Nsight Compute's documentation,
"Pipelines" (F2FP, the fast conversion to half precision, is on the ALU; IMAD on the FMA pipe, from 8.6 on on its heavy
half; conversions of integers share the XU with the special functions).

Counted is the time a pipe is busy with one trip, for all warps of a program together, if everything else is hidden
behind it. Bank conflicts, waiting and the registers' ports are not in it: what is found is a bound.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ..targets import Rates
from .sass import Instruction, Program

LANES = 32  # threads of a warp
ISSUED = 4  # instructions a clock: one for each of four schedulers
SHARED_BYTES = 128  # a clock, between shared memory or L1 and the registers

# The rates by pipe: what the columns of a report are.
PIPES = ("tensor", "fma", "fma heavy", "alu", "special", "conversion", "lsu", "issue")


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FP32 = _names("FADD FMUL FFMA FHADD FHFMA FSWZADD")
_FP32_PAIRS = _names("FADD2 FMUL2 FFMA2")
_HALF_PAIRS = _names("HADD2 HMUL2 HFMA2")
_INTEGER_FMA = _names("IMAD IMUL IDP")
_ALU = _names(
    "BMSK FMNMX FMNMX3 FSEL FSET FSETP HMNMX2 HSET2 HSETP2 IABS IADD IADD3 IMNMX ISETP LEA LOP3 MOV P2R PLOP3 PRMT "
    "R2P SEL SGXT SHF VABSDIFF VIADD VIADDMNMX VIMNMX VIMNMX3"
)
_SPECIAL = _names("BREV FLO MUFU POPC")
_CONVERSIONS = _names("F2F F2I FRND I2F")  # on the XU
_FAST_CONVERSIONS = _names("F2FP F2IP I2FP I2IP")  # on the ALU
_MEMORY = _names("ATOM ATOMG ATOMS LD LDG LDGSTS LDL LDS LDSM RED REDG ST STG STL STS STSM")
# They take an issue slot and a pipe whose rate is not published: control, barriers, constants, the uniform datapath,
# tensor memory, and copies that the copy engine makes.
_ISSUE_ONLY = _names(
    "ACQBULK BAR BPT BRA BREAK BRX BSSY BSYNC CALL CCTL CS2R DEPBAR ELECT ERRBAR EXIT FENCE JMP LDC LDCU LDGDEPBAR "
    "LDTM LEPC MEMBAR NANOSLEEP NOP PREEXIT R2UR REDUX RET S2R S2UR STTM SYNCS VOTE WARPGROUP WARPSYNC YIELD"
)
_UNIFORM = re.compile(r"U[A-Z]\w+$")

_KINDS = {"H": "half", "I": "int8", "Q": "fp8"}
_BY_WARP = re.compile(r"([HIQ])MMA\.(?:SP\.)?(16|8)(8)(\d+)\b")
_BY_WARPGROUP = re.compile(r"([HIQ])GMMA\.(\d+)x(\d+)x(\d+)")
_BY_PROGRAM = re.compile(r"UTC([HIQ])MMA\b")
_DESCRIPTOR = re.compile(r"idesc\[(UR\d+)\]")
_STEP_BYTES = 32  # of the inner dimension in one wgmma or tcgen05 instruction, whatever the type


@dataclass(frozen=True)
class Product:
    """What one instruction on the tensor cores multiplies, and the bytes it reads of shared memory.

    Attributes:
        kind: "half", "int8" or "fp8".
        macs, shared_bytes: of one execution by one warp; of the program, if `once`.
        once: whether one thread issues it for the program.
    """

    kind: str
    macs: float
    shared_bytes: float = 0.0
    once: bool = False


def product(instruction: Instruction, program: Program) -> Product | None:
    """What `instruction` multiplies; None if it is no product of matrices, or one of unknown shape."""
    opcode, operands = instruction.opcode, instruction.operands
    if found := _BY_WARP.match(opcode):
        kind, m, n, k = found[1], *map(int, found.groups()[1:])
        return Product(_KINDS[kind], m * n * k)
    if found := _BY_WARPGROUP.match(opcode):
        kind, m, n, k = found[1], *map(int, found.groups()[1:])
        # Four warps share it. Without registers as the second operand, A comes from shared memory as B does.
        rows = n + (m if re.match(r"R\d+, gdesc", operands) else 0)
        return Product(_KINDS[kind], m * n * k / 4, rows * _STEP_BYTES / 4)
    if found := _BY_PROGRAM.match(opcode):
        descriptor = _DESCRIPTOR.search(operands)
        value = program.constant(descriptor[1], instruction) if descriptor else None
        if value is None:
            return None
        # PTX ISA, "Instruction descriptor" of tcgen05: N / 8 in bits 17 to 22, M / 16 in bits 24 to 28.
        m, n, k = (value >> 24 & 31) * 16, (value >> 17 & 63) * 8, 16 if found[1] == "H" else 32
        rows = n + (m if operands.startswith("gdesc") else 0)
        return Product(_KINDS[found[1]], m * n * k, rows * _STEP_BYTES, once=True)
    return None


def bytes_of(instruction: Instruction) -> int:
    """Bytes a warp moves with one access to memory, as the pipe sees them: at least 4 for each thread."""
    if instruction.name in ("LDSM", "STSM"):
        matrices = re.search(r"\.([124])\b", instruction.opcode)
        return 128 * int(matrices[1] if matrices else 1)
    bits = re.search(r"\.(64|128|256)\b", instruction.opcode)
    return LANES * int(bits[1] if bits else 32) // 8


@dataclass(frozen=True)
class Cost:
    """What a piece of code costs a multiprocessor, for one program going through it once.

    Attributes:
        instructions: of one warp.
        cycles: by pipe of `PIPES`.
        macs: multiply-adds on the tensor cores.
        unknown: opcodes that no table has, with their counts: they are in the issue cycles only.
    """

    instructions: int
    cycles: dict[str, float]
    macs: float
    unknown: dict[str, int]

    @property
    def limit(self) -> str:
        """The pipe that is busy longest."""
        return max(self.cycles, key=self.cycles.__getitem__)

    @property
    def tensor_ceiling(self) -> float | None:
        """The share of the time that the tensor cores can be busy at most; None without products."""
        return self.cycles["tensor"] / self.cycles[self.limit] if self.macs else None


def cost(instructions: Iterable[Instruction], program: Program, rates: Rates, num_warps: int) -> Cost:
    """The cost of `instructions` of `program` for a program of `num_warps`; predicates count as true."""
    lanes: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    cycles = dict.fromkeys(PIPES, 0.0)
    issued, macs = 0, 0.0
    for instruction in instructions:
        if not instruction.runs:
            continue
        issued += 1
        if multiplied := product(instruction, program):
            times = 1 if multiplied.once else num_warps
            macs += multiplied.macs * times
            cycles["tensor"] += multiplied.macs * times / rates.macs[multiplied.kind]
            cycles["lsu"] += multiplied.shared_bytes * times / SHARED_BYTES
        elif instruction.name in _MEMORY:
            cycles["lsu"] += bytes_of(instruction) * num_warps / SHARED_BYTES
        else:
            taken = _pipes(instruction.name, rates)
            if taken is None:
                unknown[instruction.name] += 1
            else:
                lanes.update(taken)
    for pipe, share in lanes.items():
        cycles[pipe] += share * LANES * num_warps
    cycles["issue"] = issued * num_warps / ISSUED
    return Cost(issued, cycles, macs, dict(unknown))


def _pipes(name: str, rates: Rates) -> dict[str, float] | None:
    """Clocks of each pipe that one lane of an instruction takes; None for an opcode in no table."""
    if name in _FP32:
        return {"fma": 1 / rates.fp32}
    if name in _FP32_PAIRS:
        return {"fma": 2 / rates.fp32}
    if name in _HALF_PAIRS:
        return {"fma": 1 / rates.half_pairs}
    if name in _INTEGER_FMA:
        return {"fma": 1 / rates.fp32} | ({"fma heavy": 1 / rates.integer} if rates.heavy else {})
    if name in _ALU:
        return {"alu": 1 / rates.integer}
    if name in _FAST_CONVERSIONS:
        return {"alu": 1 / rates.integer, "conversion": 1 / rates.integer}
    if name in _CONVERSIONS:
        return {"special": 1 / rates.conversion, "conversion": 1 / rates.conversion}
    if name in _SPECIAL:
        return {"special": 1 / rates.special}
    if name == "SHFL":
        return {"lsu": 1 / rates.shuffle}
    return {} if name in _ISSUE_ONLY or (_UNIFORM.match(name) and not name.endswith("MMA")) else None
