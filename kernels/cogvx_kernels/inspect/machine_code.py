"""What a compiled kernel needs and does, read from its machine code with the tools in the triton wheel."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton.backends.nvidia
from triton.compiler import CompiledKernel

from ..targets import Target

_TOOLS = Path(triton.backends.nvidia.__file__).with_name("bin")
# Products of matrices: mma.sync, wgmma and tcgen05 of Nvidia, MFMA of AMD, with the types they multiply.
_MATRIX = re.compile(r"\b([HIQO]MMA|[HIQ]GMMA|UTC[HIQ]MMA|OMMA)((?:\.[\w]+)*)")
_MATRIX_AMD = re.compile(r"\b(v_mfma_\w+)")
_SPILL = re.compile(r"\b(?:LDL|STL)\b")
_GLOBAL = re.compile(r"\b(?:LDG|STG|LDGSTS)\.[\w.]*")


@dataclass(frozen=True)
class Resources:
    """What one kernel takes.

    Attributes:
        registers: a thread's; on AMD, vector and accumulator registers together.
        spills: instructions that move registers to or from memory for want of them; on AMD, registers spilled.
        stack: bytes a thread.
        shared: bytes a program.
        programs: how many fit a multiprocessor at once, and `limited_by` what.
        matrix: products of matrices in the code, kind to count.
        widths: bits of each kind of access to global memory, "load 128" to count; empty on AMD.
    """

    registers: int
    spills: int
    stack: int
    shared: int
    programs: int
    limited_by: str
    matrix: dict[str, int]
    widths: dict[str, int]

    def problems(self, target: Target) -> list[str]:
        """Why the kernel should not or cannot run on `target`."""
        found = []
        if self.spills or self.stack:
            found.append(f"spills: {self.spills} instructions, {self.stack} bytes of stack")
        if self.shared > target.limits.shared_per_program:
            found.append(f"{self.shared} bytes of shared memory, {target.limits.shared_per_program} at most")
        if self.programs < 1:
            found.append(f"does not fit a multiprocessor: {self.limited_by}")
        return found


def read(compiled: CompiledKernel, target: Target) -> Resources:
    """The resources of a kernel compiled for `target`.

    Raises:
        RuntimeError: where the tools that read machine code are not installed, for a target of Nvidia's.
    """
    if "amdgcn" not in compiled.asm and (reason := why_unavailable()):
        raise RuntimeError(f"machine code cannot be read: {reason}")
    return _read_amd(compiled, target) if "amdgcn" in compiled.asm else _read_nvidia(compiled, target)


def disassemble(compiled: CompiledKernel) -> str:
    """The machine code as text."""
    return compiled.asm["amdgcn"] if "amdgcn" in compiled.asm else _run("nvdisasm", "-c", compiled.asm["cubin"])


def why_unavailable() -> str | None:
    """What keeps machine code from being read, or None: the tools come with triton's wheel, not with every build."""
    missing = [tool for tool in ("cuobjdump", "nvdisasm") if not os.access(_TOOLS / tool, os.X_OK)]
    return f"{' and '.join(missing)} of the triton wheel are not in {_TOOLS}" if missing else None


def _run(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / tool), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _read_nvidia(compiled: CompiledKernel, target: Target) -> Resources:
    usage = _run("cuobjdump", "--dump-resource-usage", compiled.asm["cubin"])
    registers, stack = (_number(rf"\b{name}:(\d+)", usage) for name in ("REG", "STACK"))
    code = disassemble(compiled)
    per_warp = -(-registers // 8) * 8 * 32  # registers are given out to warps in blocks of 256
    by_registers = (1 << 16) // per_warp // warps(compiled)
    programs, limited_by = _programs(compiled, target, by_registers)
    return Resources(
        registers,
        len(_SPILL.findall(code)),
        stack,
        compiled.metadata.shared,
        programs,
        limited_by,
        dict(Counter(kind + types for kind, types in _MATRIX.findall(code))),
        dict(Counter(map(_width, _GLOBAL.findall(code)))),
    )


def _number(pattern: str, text: str) -> int:
    """What the group of `pattern` is where it is first found."""
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no {pattern} in what the tools say of a kernel")
    return int(found[1])


def warps(compiled: CompiledKernel) -> int:
    """The warps of the kernel's options and those that warp specialization adds."""
    return getattr(compiled.metadata, "total_num_warps", None) or compiled.metadata.num_warps


def _width(instruction: str) -> str:
    bits = re.search(r"\.(64|128|256)\b", instruction) or re.search(r"\.[US](8|16)\b", instruction)
    kind = "copy" if instruction.startswith("LDGSTS") else "load" if instruction.startswith("LDG") else "store"
    return f"{kind} {bits[1] if bits else 32}"


def _read_amd(compiled: CompiledKernel, target: Target) -> Resources:
    code = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return _number(rf"\.{name}:\s*(\d+)", code)

    registers = field("vgpr_count")  # on CDNA 3 this counts the accumulator registers, too
    by_registers = 4 * (512 // max(8, -(-registers // 8) * 8)) // compiled.metadata.num_warps
    programs, limited_by = _programs(compiled, target, by_registers)
    spills, stack = field("vgpr_spill_count"), field("private_segment_fixed_size")
    matrix = dict(Counter(_MATRIX_AMD.findall(code)))
    return Resources(registers, spills, stack, compiled.metadata.shared, programs, limited_by, matrix, {})


def _programs(compiled: CompiledKernel, target: Target, by_registers: int) -> tuple[int, str]:
    limits, shared = target.limits, compiled.metadata.shared
    reserved = 0 if target.capability is None else 1024  # by the system, of each program on Nvidia
    bounds = {
        "registers": by_registers,
        "shared memory": limits.shared // (shared + reserved) if shared + reserved else limits.programs,
        "warps": limits.warps // warps(compiled),
        "programs": limits.programs,
    }
    limited_by = min(bounds, key=bounds.__getitem__)
    return bounds[limited_by], limited_by
