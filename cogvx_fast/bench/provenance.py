"""Where a number comes from: what a row says of the machine, the libraries and the code."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__, machine
from . import gpu

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "triton", "diffusers", "transformers", "torchao", "accelerate", "numpy")
# Rows are appended while the code stays as it is: they do not make the checkout dirty.
_RESULTS = "benchmarks/results"


@dataclass(frozen=True)
class Provenance:
    """All that a reader needs to judge a time. Memory in bytes, power in watts.

    Attributes:
        device: as torch names it, "cpu" or "cuda:0".
        cores, threads: those the process may use, and those torch does use.
        load_average: processes that wanted a core over the last minute, when the run began; None if unknown.
        cuda: compute capability, multiprocessors, memory, driver, power limit and clock limit; None on a CPU.
        versions: of `PACKAGES` and of Python and this package; None for what is not installed.
        git_commit, git_dirty: of the checkout that the package runs from; None if it runs from none.
    """

    device: str
    device_name: str
    cpu_name: str
    cpu_features: list[str]
    cores: int
    threads: int
    memory_bytes: int | None
    load_average: float | None
    system: str
    cuda: dict[str, Any] | None
    versions: dict[str, str | None]
    git_commit: str | None
    git_dirty: bool | None


def collect(device: torch.device | str) -> Provenance:
    """What there is to know now about `device` and this installation."""
    cpu, cuda = machine.cpu(), _cuda(str(device), machine.cuda_devices())
    commit, dirty = git_state(Path(__file__).resolve().parents[1])
    versions: dict[str, str | None] = {"cogvx_fast": __version__, "python": platform.python_version()}
    return Provenance(
        device=str(device),
        device_name=cuda["name"] if cuda else cpu["name"],
        cpu_name=cpu["name"],
        cpu_features=cpu["features"],
        cores=cpu["cores"],
        threads=cpu["torch_threads"],
        memory_bytes=cpu["memory"],
        load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        system=f"{platform.system()} {platform.release()}",
        cuda=cuda,
        versions=versions | {package: machine.installed_version(package) for package in PACKAGES},
        git_commit=commit,
        git_dirty=dirty,
    )


def git_state(package: Path) -> tuple[str | None, bool | None]:
    """Commit and dirty flag of the checkout that the folder `package` belongs to; None and None if it is in none.

    Dirty means: a file is changed, or one that git does not ignore is new, the result rows aside. A package that is
    installed into a folder that a checkout ignores, such as `.venv`, is not of that checkout.
    """
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None, None
    top = _git(package, "rev-parse", "--show-toplevel")
    commit = _git(package, "rev-parse", "HEAD")
    if top is None or commit is None:  # a repository without a commit
        return None, None
    changes = _git(Path(top), "status", "--porcelain", "--", ".", f":(exclude){_RESULTS}")
    return commit, None if changes is None else bool(changes)


def _git(folder: Path, *arguments: str) -> str | None:
    # Variables such as GIT_DIR, which git sets for its hooks, would lead to another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return _output(["git", "-C", str(folder), *arguments], environment)


def _cuda(device: str, devices: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not device.startswith("cuda"):
        return None
    import torch

    index = torch.device(device).index
    index = torch.cuda.current_device() if index is None else index
    own = next(dict(found) for found in devices if found["device"] == f"cuda:{index}")
    answer = gpu.ask(gpu.identifier(index), ("driver_version", "power.limit", "clocks.max.sm"))
    driver, power, clock = answer or (None, None, None)
    return own | {"driver": driver, "power_limit_watts": gpu.number(power), "max_sm_clock_mhz": gpu.number(clock)}


def _output(command: list[str], environment: dict[str, str] | None = None) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
