"""Where a step runs, how it times, and the rows that it leaves."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cogvx_fast.bench import provenance

REPEATS = 5


@dataclass
class Setting:
    """One run of one step.

    Attributes:
        rehearses: on a CPU at toy size.
        out: the file that rows are added to; None: none is.
        deadline: of `time.monotonic`, after which nothing more is begun.
        rows: what was found so far; `left_out`: what was not tried, and why.
    """

    step: str
    device: torch.device
    rehearses: bool
    out: Path | None
    deadline: float
    machine: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    @classmethod
    def make(cls, step: str, device: str, rehearses: bool, out: Path | None, minutes: float) -> Setting | str:
        """The setting, or what keeps the step from running there."""
        if not rehearses and not torch.cuda.is_available():
            return "there is no GPU here; --rehearse runs every step on a CPU at toy size"
        where = torch.device("cpu" if rehearses else device)
        deadline = time.monotonic() + 60 * minutes
        return cls(step, where, rehearses, out, deadline, dataclasses.asdict(provenance.collect(where)))

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def has_time_for(self, name: str) -> bool:
        """Whether `name` may begin; if not, it is noted as left out."""
        if time.monotonic() < self.deadline:
            return True
        self.left_out[name] = "the step's time was over"
        return False

    def seconds(self, call: Callable[[], Any], launches: int = 3) -> float:
        """Of one call: the median of `REPEATS` times `launches` calls in a queue, after one that compiles and tunes."""
        call()
        times = []
        for _ in range(REPEATS):
            if self.device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                with torch.cuda.device(self.device):
                    start.record()
                    for _ in range(launches):
                        call()
                    end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) / 1000 / launches)
            else:
                start_time = time.perf_counter()
                call()
                times.append(time.perf_counter() - start_time)
        return statistics.median(times)

    def normal(self, *shape: int, dtype: torch.dtype | None = None, seed: int = 0) -> torch.Tensor:
        """Made on the device, which is fast there, and the same at each run."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, dtype=dtype or self.dtype, device=self.device, generator=generator)

    def add(self, name: str, **found: Any) -> None:
        """Keep a row, and write it at once: a machine may be gone before a step is over."""
        row = {"step": self.step, "name": name, "rehearsal": self.rehearses, **found}
        self.rows.append(row)
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with self.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row | {"machine": self.machine}, default=str) + "\n")

    def tried(self, name: str, call: Callable[[], dict[str, Any]]) -> bool:
        """A row of what `call` finds, or of why it failed; nothing if there is no time for it."""
        if not self.has_time_for(name):
            return True
        try:
            self.add(name, **call())
        except Exception as error:  # whatever it dies of is an answer, too
            self.add(name, failed=f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}")
            return False
        return True

    def show(self) -> None:
        """The table of the step, short enough to be the last thing that is seen."""
        hidden = {"step", "name", "rehearsal"}
        kind = ", a rehearsal on a CPU: times say nothing" if self.rehearses else ""
        print(f"\n== {self.step} on {self.machine.get('device_name') or self.device}{kind}")
        for row in self.rows:
            values = {name: value for name, value in row.items() if name not in hidden and value is not None}
            shown = (
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in values.items()
            )
            print(f"  {row['name']:34} {'  '.join(shown)}"[:300])
        for name, why in self.left_out.items():
            print(f"  {name:34} left out: {why}")
