"""The GPUs that the kernels are made for, one row each, and boards that carry them: all that depends on a GPU but code.

A new GPU is one row of `TARGETS`. Kernels have their configurations by family, so that a GPU of a family that is here
needs none of its own.

Sources. Limits: tables of compute capabilities in Nvidia's CUDA programming guide, and AMD's CDNA 3 instruction set
architecture reference. Rates: the same guide, "Throughput of Native Arithmetic Instructions"; tensor cores from the
architecture whitepapers of A100 (256 half-precision multiply-adds a clock for each of 4), GA102 and AD102 (128) and
H100 (512), for B200 and RTX Blackwell datasheet FLOP/s by multiprocessors and boost clock. Boards: Nvidia's datasheets
of A100, A10, L40S, H100, H200 and B200, and its whitepapers of GA102, AD102 and RTX Blackwell for the GeForce boards;
where a sheet states rates with sparsity only, half of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Limits:
    """The limits of one multiprocessor: bytes of shared memory a program may have and all together, warps and programs.

    Each has 65,536 registers (AMD: 512 for each lane of four SIMDs).
    """

    shared_per_program: int
    shared: int
    warps: int
    programs: int


@dataclass(frozen=True)
class Rates:
    """Results of one multiprocessor and clock.

    Attributes:
        fp32: results of fp32 add, multiply and multiply-add.
        half_pairs: instructions' lanes of packed half-precision arithmetic, two results each.
        macs: multiply-adds of the tensor cores, by kind of operand.
        heavy: whether integer multiply-add has half of the FMA pipe only.
    """

    fp32: int
    half_pairs: int
    macs: dict[str, int]
    heavy: bool = True
    integer: int = 64
    special: int = 16
    conversion: int = 16
    shuffle: int = 32


@dataclass(frozen=True)
class Board:
    """One board: dense tensor-core rates with fp32 (int8: int32) sums, and memory.

    Attributes:
        matches: words that its name, as the driver gives it, has in it.
        clock: of the multiprocessors, GHz, at which the rates hold.
        bandwidth: of device memory, GB/s.
        half, int8: TFLOP/s and TOP/s of the tensor cores.
    """

    matches: str
    multiprocessors: int
    clock: float
    bandwidth: float
    half: float
    int8: float

    @property
    def bytes_per_clock(self) -> float:
        """Bytes of device memory a clock, for each multiprocessor."""
        return self.bandwidth / (self.multiprocessors * self.clock)


@dataclass(frozen=True)
class Target:
    """A GPU architecture that kernels are compiled for.

    Attributes:
        name: as compilers spell it.
        capability: compute capability; None for AMD's.
        family: whose configurations fit it: "a100"; "rtx", mma.sync with 99 KiB of shared memory; "hopper", wgmma;
            "blackwell", tcgen05; "rtx-blackwell"; "cdna".
        e4m3: whether it multiplies numbers of float8_e4m3fn. The MI300 has another kind of e4m3.
        rates: of its pipes; None where they are not modelled.
        boards: that carry it; the memory of the first stands for all where a kernel's bytes become time.
    """

    name: str
    capability: tuple[int, int] | None
    family: str
    e4m3: bool
    limits: Limits
    rates: Rates | None
    boards: tuple[Board, ...]


_A100 = Limits(163 << 10, 164 << 10, 64, 32)
_GA102, _ADA = Limits(99 << 10, 100 << 10, 48, 16), Limits(99 << 10, 100 << 10, 48, 24)
_HOPPER = Limits(227 << 10, 228 << 10, 64, 32)
_CDNA3 = Limits(64 << 10, 64 << 10, 32, 16)
# GeForce boards of 8.6, 8.9 and 12.0 accumulate in fp32 at half the rate of the professional ones: here are the latter,
# for which the other pipes have less time.
_RTX = {"half": 512, "int8": 1024}
_A100_RATES = Rates(64, 128, {"half": 1024, "int8": 2048}, heavy=False)
_HOPPER_RATES = Rates(128, 128, {"half": 2048, "int8": 4096, "fp8": 4096})
_BLACKWELL_RATES = Rates(128, 128, {"half": 4096, "int8": 8192, "fp8": 8192})
_A100_BOARDS = (
    Board("A100-SXM4-80GB", 108, 1.41, 2039, 312, 624),
    Board("A100 80GB", 108, 1.41, 1935, 312, 624),
    Board("A100", 108, 1.41, 1555, 312, 624),
)
_GA102_BOARDS = Board("RTX 3090", 82, 1.695, 936, 71, 284), Board("A10", 72, 1.695, 600, 125, 250)
_ADA_BOARDS = Board("RTX 4090", 128, 2.52, 1008, 165.2, 660.6), Board("L40S", 142, 2.52, 864, 362, 733)
_HOPPER_BOARDS = (
    Board("H100", 132, 1.83, 3350, 989, 1979),
    Board("H100 PCIe", 114, 1.62, 2000, 756, 1513),
    Board("H200", 132, 1.83, 4800, 989, 1979),
)
_B200 = Board("B200", 148, 1.86, 8000, 2250, 4500)
_RTX_5090 = Board("RTX 5090", 170, 2.407, 1792, 209.5, 838)
_ROWS = (
    Target("sm_80", (8, 0), "a100", False, _A100, _A100_RATES, _A100_BOARDS),
    Target("sm_86", (8, 6), "rtx", False, _GA102, Rates(128, 64, _RTX), _GA102_BOARDS),
    Target("sm_89", (8, 9), "rtx", True, _ADA, Rates(128, 64, _RTX | {"fp8": 1024}), _ADA_BOARDS),
    Target("sm_90", (9, 0), "hopper", True, _HOPPER, _HOPPER_RATES, _HOPPER_BOARDS),
    Target("sm_100", (10, 0), "blackwell", True, _HOPPER, _BLACKWELL_RATES, (_B200,)),
    Target("sm_120", (12, 0), "rtx-blackwell", True, _ADA, Rates(128, 64, _RTX | {"fp8": 1024}), (_RTX_5090,)),
    Target("gfx942", None, "cdna", False, _CDNA3, None, ()),  # MI300
)
TARGETS: dict[str, Target] = {target.name: target for target in _ROWS}
OLDEST = _ROWS[0]


def board(name: str) -> Board | None:
    """The board with that name, as the driver gives it; None for one that no target has."""
    known = [one for target in TARGETS.values() for one in target.boards if re.search(rf"\b{one.matches}\b", name)]
    return max(known, key=lambda one: len(one.matches), default=None)


def target_of(device: torch.device) -> Target:
    """The target whose configurations a device uses: its own, or the nearest below it of its kind.

    Without a GPU it is the oldest: then the tensors are fake, the kernel is traced and not launched, or interpreted.

    Raises:
        ValueError: for a GPU older than any in `TARGETS`.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return OLDEST
    if torch.version.hip:
        return TARGETS["gfx942"]
    own = torch.cuda.get_device_capability(device)
    below = [target for target in TARGETS.values() if target.capability is not None and target.capability <= own]
    if not below:
        raise ValueError(f"the Triton kernels need compute capability 8.0, {device} has {own[0]}.{own[1]}")
    return max(below, key=lambda target: target.capability or (0, 0))


def why_not_e4m3(device: torch.device) -> str | None:
    """What keeps a device from multiplying numbers of float8_e4m3fn, or None; None as well where no GPU is."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(device)
    if torch.version.hip:
        return f"{name} multiplies float8_e4m3fnuz, another type, and has no instruction for this one"
    major, minor = torch.cuda.get_device_capability(device)
    return None if (major, minor) >= (8, 9) else f"{name} has compute capability {major}.{minor}, it needs 8.9"
