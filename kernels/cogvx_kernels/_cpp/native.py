"""Which CPU `-march=native` means: what is compiled for one may end a process on another with SIGILL."""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
# What compilers resolve `native` from, on x86, Arm, RISC-V, POWER and s390.
_INSTRUCTIONS = ("flags", "Features", "features", "isa", "cpu")
_MODEL = ("vendor_id", "cpu family", "model", "stepping")
_PARTS = ("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "uarch")
_ASK = ("-march=native", "-###", "-x", "c++", "-c", "/dev/null", "-o", "/dev/null")
_ANSWER = re.compile(r"-m[\w.+=-]+|-target-(?:cpu|feature|abi)\W+[\w.+-]+")


@functools.cache
def cpu() -> str | None:
    """The model and the instructions of this machine's CPU as the kernel shows them, or None where it does not.

    It takes no process, and no compiler: what is compiled here is found again where there is none.
    """
    found: dict[str, str] = {}
    try:
        with _CPUINFO.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                name, _, value = (part.strip() for part in line.partition(":"))
                if name == "" and found:
                    break  # the next core's, which has the same instructions
                if name in (*_INSTRUCTIONS, *_MODEL, *_PARTS):
                    found[name] = " ".join(sorted(value.split()))
    except OSError:
        return None
    return repr(sorted(found.items())) if any(name in found for name in _INSTRUCTIONS) else None


@functools.cache
def resolved(command: str) -> str | None:
    """What the compiler `command` makes of `-march=native`, or None if it does not say: a process of some ms."""
    try:
        process = subprocess.run(
            [command, *_ASK], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    answer = [option for option in _ANSWER.findall(process.stderr) if option != "-march=native"]
    return " ".join(answer) or None
