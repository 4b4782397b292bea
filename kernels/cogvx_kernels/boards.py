"""What boards can do at best, from their datasheets: dense tensor-core rates with fp32 (int8: int32) sums, and memory.

Nvidia's datasheets of A100, A10, L40S, H100, H200 and B200, and its architecture whitepapers of GA102, AD102 and RTX
Blackwell for the GeForce boards. Where a sheet states rates with sparsity only, half of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Board:
    """One board.

    Attributes:
        matches: words that its name, as the driver gives it, has in it.
        clock: of the multiprocessors, GHz, at which the rates hold.
        bandwidth: of device memory, GB/s.
        half, int8: TFLOP/s and TOP/s of the tensor cores.
    """

    matches: str
    target: str
    multiprocessors: int
    clock: float
    bandwidth: float
    half: float
    int8: float

    @property
    def bytes_per_clock(self) -> float:
        """Of device memory, for each multiprocessor."""
        return self.bandwidth / (self.multiprocessors * self.clock)


# The first that matches is taken: longer names stand before shorter ones.
BOARDS = (
    Board("A100-SXM4-80GB", "sm_80", 108, 1.41, 2039, 312, 624),
    Board("A100 80GB", "sm_80", 108, 1.41, 1935, 312, 624),
    Board("A100", "sm_80", 108, 1.41, 1555, 312, 624),
    Board("A10", "sm_86", 72, 1.695, 600, 125, 250),
    Board("RTX 3090", "sm_86", 82, 1.695, 936, 71, 284),
    Board("RTX 4090", "sm_89", 128, 2.52, 1008, 165.2, 660.6),
    Board("L40S", "sm_89", 142, 2.52, 864, 362, 733),
    Board("H100 PCIe", "sm_90", 114, 1.62, 2000, 756, 1513),
    Board("H100", "sm_90", 132, 1.83, 3350, 989, 1979),
    Board("H200", "sm_90", 132, 1.83, 4800, 989, 1979),
    Board("B200", "sm_100", 148, 1.86, 8000, 2250, 4500),
    Board("RTX 5090", "sm_120", 170, 2.407, 1792, 209.5, 838),
)
# Whose memory a kernel for a target is held against: the fastest that has been sold most.
REFERENCE = {
    "sm_80": "A100-SXM4-80GB",
    "sm_86": "RTX 3090",
    "sm_89": "RTX 4090",
    "sm_90": "H100",
    "sm_100": "B200",
    "sm_120": "RTX 5090",
}


def board(name: str) -> Board | None:
    """The board with that name, as the driver gives it; None for one that is not in the table."""
    return next((one for one in BOARDS if re.search(rf"\b{one.matches}\b", name)), None)
