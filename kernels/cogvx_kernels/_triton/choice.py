"""Which of a kernel's configurations is the fastest: timed once for each kind of problem, and kept on disk.

Candidates are launched on the problem itself, several times: nothing is copied and nothing is allocated, so that a
first launch takes no memory that the last does not. They take turns, so that a clock that falls falls for all. What
was found lies beside the compiled kernels, in triton's cache, by the GPU's name and the hash of the kernel's source: a
cache that is carried along brings its choices.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton import knobs
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

if TYPE_CHECKING:
    from .tuned import TunedKernel

FILE = "cogvx-fast-choices.json"
ROUNDS, LAUNCHES = 3, 3  # the least of the rounds counts
_known: dict[str, str] = {}  # by problem, what was read or found by this process
_read_from: set[Path] = set()


def describe(config: triton.Config) -> str:
    """The parameters of a configuration, as `ROWS 2, 8 warps` or `BLOCK_M 128, BLOCK_N 64, 4 warps, 3 stages`."""
    given = {name: value for name, value in config.kwargs.items() if value is not False}
    values = [name if value is True else f"{name} {value}" for name, value in given.items()]
    values.append(f"{config.num_warps} warps")
    values += [f"{config.num_stages} stages"] if config.num_stages > 1 else []
    return ", ".join(values + ([f"at most {config.maxnreg} registers"] if config.maxnreg is not None else []))


def bucket(size: int) -> int:
    """The power of two at or above `size`: a toy clip does not decide for a long one."""
    return triton.next_power_of_2(max(size, 1))


@dataclass(frozen=True)
class Problem:
    """What a choice holds for.

    Attributes:
        kernel: what is launched.
        device: on which GPU.
        values: of the arguments in the kernel's key.
        given: of each argument by position: the dtype of a tensor, whether anything else is None.
        constants: of the kernel, by name.
        bucket: of the problem's size.
    """

    kernel: TunedKernel
    device: torch.device
    values: tuple[Any, ...]
    given: tuple[Any, ...]
    constants: tuple[tuple[str, Any], ...]
    bucket: int

    @classmethod
    def of(
        cls, kernel: TunedKernel, device: torch.device, arguments: Sequence[Any], meta: dict[str, Any], size: int
    ) -> Problem:
        names = kernel.fn.arg_names
        values = tuple(meta[name] if name in meta else arguments[names.index(name)] for name in kernel.key)
        given = tuple(value.dtype if isinstance(value, torch.Tensor) else value is None for value in arguments)
        return cls(kernel, device, values, given, tuple(meta.items()), bucket(size))

    @property
    def key(self) -> tuple[Any, ...]:
        """What a process finds the choice by. A kernel's lists may be replaced."""
        return id(self.kernel.configs), self.device, self.values, self.given, self.constants, self.bucket

    def __str__(self) -> str:
        """In a line, for what is kept on disk: kernel, GPU, values of its key, dtypes and what is not there, size."""
        kernel, name = self.kernel, torch.cuda.get_device_name(self.device).replace(" ", "_")
        values = [f"{name}={value}" for name, value in zip(kernel.key, self.values, strict=True)]
        values += [f"{name}={value}" for name, value in self.constants if name not in kernel.key]
        values += [
            f"{name}:{'none' if given is True else str(given).removeprefix('torch.')}"
            for name, given in zip(kernel.fn.arg_names, self.given, strict=False)
            if given is not False
        ]
        return " ".join([kernel.name, kernel.fn.cache_key[:16], name, *values, f"size<={self.bucket}"])


def known(problem: Problem, candidates: Sequence[triton.Config]) -> triton.Config | None:
    """What a process before found to be the fastest of `candidates`, or this one; None if that is not known."""
    question = str(problem)
    if question not in _known:
        _read()
    by_name = {describe(config): config for config in candidates}
    return by_name.get(_known.get(question, ""))


def time(problem: Problem, candidates: Sequence[triton.Config], run: Callable[[triton.Config], None]) -> triton.Config:
    """The fastest of `candidates`, by `run`, which launches one; it is remembered.

    Raises:
        OutOfResources: or what else triton raises, if none can be launched.
    """
    times, failure = _times(candidates, run)
    if not times and failure is not None:
        raise failure
    best = min(times, key=lambda name: times[name])
    _known[str(problem)] = best
    _write()
    return next(config for config in candidates if describe(config) == best)


def _times(
    candidates: Sequence[triton.Config], run: Callable[[triton.Config], None]
) -> tuple[dict[str, float], Exception | None]:
    """The time of each that can be launched, and why one of the others cannot."""
    able, failure = [], None
    for config in candidates:
        try:
            run(config)  # compiles
            able.append(config)
        except (OutOfResources, CompilationError, PTXASError) as error:
            failure = error
    times: dict[str, float] = {}
    for _ in range(ROUNDS if len(able) > 1 else 1):
        for config in able:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(LAUNCHES):
                run(config)
            end.record()
            end.synchronize()
            name = describe(config)
            times[name] = min(start.elapsed_time(end), times.get(name, float("inf")))
    return times, failure


def _path() -> Path:
    return Path(knobs.cache.dir) / FILE


def _read() -> None:
    """Take over what the cache knows; a file that cannot be read, or is another's, knows nothing."""
    path = _path()
    if path not in _read_from:
        _read_from.add(path)
        _known.update({q: c for q, c in _stored(path).items() if q not in _known})


def _stored(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {q: c for q, c in content.items() if isinstance(q, str) and isinstance(c, str)}


def _write() -> None:
    """Add what this process knows to the file, which appears whole. A cache that cannot be written keeps nothing."""
    path = _path()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(_stored(path) | _known, indent=1, sort_keys=True) + "\n"
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".partial", delete=False, encoding="utf-8") as f:
            try:
                f.write(content)
                f.close()
                os.replace(f.name, path)
            except BaseException:
                os.unlink(f.name)
                raise
