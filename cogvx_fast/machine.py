"""What this machine is: versions, CPU features, GPUs. Shown by `cogvx-fast doctor` and kept with every result row."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Vector and matrix extensions that torch's CPU kernels use, as /proc/cpuinfo names them.
CPU_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX512-VNNI (int8)",
    "avx512_bf16": "AVX512-BF16",
    "amx_bf16": "AMX-BF16",
    "amx_int8": "AMX-INT8",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "BF16",
    "i8mm": "INT8 matrices",
}


def installed_version(package: str) -> str | None:
    """The version of an installed distribution; None if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_features(cpuinfo: str) -> list[str]:
    """The features of `CPU_FEATURES` that the text of /proc/cpuinfo names."""
    flags = {
        flag
        for line in cpuinfo.splitlines()
        if line.split(":")[0].strip() in ("flags", "Features")
        for flag in line.partition(":")[2].split()
    }
    return [name for flag, name in CPU_FEATURES.items() if flag in flags]


def cpu() -> dict[str, Any]:
    """Name, features, cores, torch's threads and capability, and memory in bytes (None where it is unknown)."""
    import torch

    cpuinfo = _read("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    memory = _meminfo()
    return {
        "name": models[0] if models else platform.machine(),
        "features": cpu_features(cpuinfo),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "memory": memory.get("MemTotal"),
        "memory_available": memory.get("MemAvailable"),
    }


def free_memory() -> int | None:
    """Bytes of memory and swap that a process can still take, also within a container's limit; None: unknown."""
    memory = _meminfo()
    if "MemAvailable" not in memory:
        return None
    free = memory["MemAvailable"] + memory.get("SwapFree", 0)
    limit, used = (_read(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    if limit.isdecimal() and used.isdecimal():  # "max" where there is none
        cached = re.search(r"^inactive_file (\d+)$", _read("/sys/fs/cgroup/memory.stat"), re.MULTILINE)
        free = min(free, int(limit) - int(used) + (int(cached[1]) if cached else 0))
    return max(free, 0)


def cpu_bf16_units() -> str | None:
    """The name of what multiplies bf16 matrices in this CPU, several times as fast as fp32; None if nothing does."""
    import torch

    if torch.cpu._is_amx_tile_supported():
        return CPU_FEATURES["amx_bf16"]
    return CPU_FEATURES["avx512_bf16"] if torch.cpu._is_avx512_bf16_supported() else None


def cpu_dtype() -> str:
    """bfloat16 where the CPU has units for it, else float32."""
    return "float32" if cpu_bf16_units() is None else "bfloat16"


def cpu_int8_units() -> str | None:
    """The name of what multiplies int8 matrices in this CPU, twice as fast as bf16 ones; None if nothing does."""
    import torch

    if torch.cpu._is_amx_tile_supported():
        return CPU_FEATURES["amx_int8"]
    return CPU_FEATURES["avx512_vnni"] if torch.cpu._is_vnni_supported() else None


def cuda_devices() -> list[dict[str, Any]]:
    """Name, compute capability, features, multiprocessors and memory in bytes of every CUDA device."""
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "features": gpu_features((properties.major, properties.minor)),
                "multiprocessors": properties.multi_processor_count,
                "memory": properties.total_memory,
            }
        )
    return devices


def gpu_features(capability: tuple[int, int]) -> list[str]:
    """The precisions that tensor cores of this compute capability have."""
    since = {"fp16": (7, 0), "int8": (7, 2), "bf16": (8, 0), "fp8": (8, 9)}
    return [name for name, first in since.items() if capability >= first]


def has_mps() -> bool:
    """Whether torch can use an Apple GPU."""
    import torch

    return torch.backends.mps.is_available()


def return_freed_memory() -> None:
    """Give the operating system back what the C library's heap keeps of freed memory, where it can be told to (glibc).

    It keeps blocks of up to 32 MiB for reuse, wherever smaller live ones between them keep it from merging them.
    """
    _trim()(0)


@functools.cache
def _trim() -> Callable[[int], int]:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; Windows has no library without a name
        return lambda pad: 0


def _meminfo() -> dict[str, int]:
    lines = [line for line in _read("/proc/meminfo").splitlines() if " kB" in line]
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:  # no Linux
        return ""
