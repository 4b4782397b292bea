"""`cogvx-fast doctor`: what is installed, what the machine can do, and what would help."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

PACKAGES = ("torch", "triton", "diffusers", "transformers", "torchao")
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


@dataclass(frozen=True)
class Backend:
    """Something optional: the module to look for, the package it comes in, what it gives and how to get it."""

    module: str
    package: str
    gives: str
    install: str


BACKENDS = {
    "flash-attn": Backend(
        "flash_attn",
        "flash-attn",
        "exact attention kernels for NVIDIA GPUs (fp16, bf16)",
        'pip install "cogvx_fast[flash]"',
    ),
    "xformers": Backend(
        "xformers", "xformers", "exact memory-efficient attention for NVIDIA GPUs", 'pip install "cogvx_fast[xformers]"'
    ),
    "sageattention": Backend(
        "sageattention", "sageattention", "int8 attention kernels for NVIDIA GPUs (lossy)", "pip install sageattention"
    ),
    "peft": Backend("peft", "peft", "LoRA weights: pipe.load_lora_weights(...)", "pip install peft"),
    "matplotlib": Backend("matplotlib", "matplotlib", "plots of benchmark results", 'pip install "cogvx_fast[plots]"'),
}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="For machines: print one JSON object.")] = False,
) -> None:
    """Show versions, devices with their capabilities, and optional backends."""
    report = examine()
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _show(report)


def examine() -> dict[str, Any]:
    """Everything `doctor` shows: `versions`, `cpu`, `cuda` (a list), `mps`, `backends`. Memory is in bytes.

    Optional packages are looked up, never imported: some of them fail or take long on import.
    """
    from cogvx_fast import __version__

    versions = {"cogvx_fast": __version__, "python": platform.python_version()}
    versions |= {package: installed_version(package) for package in PACKAGES}
    return {
        "versions": versions,
        "cpu": _cpu(),
        "cuda": _cuda_devices(),
        "mps": _has_mps(),
        "backends": {name: _look_up(backend) for name, backend in BACKENDS.items()} | {"libx264": _look_up_h264()},
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


def _cpu() -> dict[str, Any]:
    import torch

    cpuinfo = _read("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    memory = {
        line.split(":")[0]: int(line.split()[1]) * 1024 for line in _read("/proc/meminfo").splitlines() if " kB" in line
    }
    return {
        "name": models[0] if models else platform.machine(),
        "features": cpu_features(cpuinfo),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "memory": memory.get("MemTotal"),
        "memory_available": memory.get("MemAvailable"),
    }


def _cuda_devices() -> list[dict[str, Any]]:
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "features": _gpu_features((properties.major, properties.minor)),
                "multiprocessors": properties.multi_processor_count,
                "memory": properties.total_memory,
            }
        )
    return devices


def _gpu_features(capability: tuple[int, int]) -> list[str]:
    since = {"fp16": (7, 0), "int8": (7, 2), "bf16": (8, 0), "fp8": (8, 9)}
    return [name for name, first in since.items() if capability >= first]


def _has_mps() -> bool:
    import torch

    return torch.backends.mps.is_available()


def _look_up(backend: Backend) -> dict[str, Any]:
    found = importlib.util.find_spec(backend.module) is not None
    return {
        "found": found,
        "version": installed_version(backend.package) if found else None,
        "gives": backend.gives,
        "install": backend.install,
    }


def _look_up_h264() -> dict[str, Any]:
    import av

    try:
        av.codec.Codec("libx264", "w")
        found = True
    except av.codec.codec.UnknownCodecError:
        found = False
    return {
        "found": found,
        "version": f"PyAV {av.__version__}",
        "gives": "MP4 output (H.264)",
        "install": "pip install --force-reinstall av",
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:  # no Linux
        return ""


def _show(report: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from .console import results

    versions = Table("package", "version", title="Versions", title_justify="left")
    for name, version in report["versions"].items():
        versions.add_row(name, version or "not installed")
    results.print(versions)

    devices = Table("device", "name", "can", "size", title="Devices", title_justify="left")
    for gpu in report["cuda"]:
        can = f"capability {gpu['capability']}: {', '.join(gpu['features'])}"
        devices.add_row(gpu["device"], gpu["name"], can, f"{_gib(gpu['memory'])}, {gpu['multiprocessors']} SMs")
    if report["mps"]:
        devices.add_row("mps", "Apple GPU", "", "")
    cpu = report["cpu"]
    devices.add_row(
        "cpu",
        cpu["name"],
        f"{', '.join(cpu['features']) or 'no known extension'}; torch uses {cpu['torch_capability']}",
        f"{_gib(cpu['memory'])}, {_gib(cpu['memory_available'])} free; "
        f"{cpu['cores']} cores, {cpu['torch_threads']} threads",
    )
    results.print(devices)
    if not report["cuda"]:
        results.print("No CUDA device found: the pipelines run on the CPU, and GPU kernels are not used.")

    backends = Table("backend", "found", title="Optional backends", title_justify="left")
    backends.add_column("gives", overflow="fold")
    backends.add_column("get it with", overflow="fold")
    for name, backend in report["backends"].items():
        found = (backend["version"] or "yes") if backend["found"] else "no"
        # Cells are read as markup, which would swallow the brackets of "cogvx_fast[flash]".
        install = "" if backend["found"] else escape(backend["install"])
        backends.add_row(name, found, backend["gives"], install)
    results.print(backends)


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
