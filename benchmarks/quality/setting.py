"""What is compared: a checkpoint, its prompts, and how a generation is made. A work folder is of one setting."""

from __future__ import annotations

import hashlib
import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvx_fast.files import write_whole

from .prompts import Prompts

LEAST = 4  # evaluations: what a second order and an end need


@dataclass(frozen=True)
class Setting:
    """Attributes:
    model: a folder or a Hub id.
    workload: its name in rows.
    dtype: name of a torch dtype.
    batch: clips of one generation.
    schedule: file of the schedules that the engine's own method follows; None: those that there are.
    """

    model: str
    workload: str
    prompts: Prompts
    dtype: str = "bfloat16"
    device: str = "cpu"
    steps: int = 50
    guidance: float = 6.0
    batch: int = 1
    schedule: str | None = None

    @property
    def batches(self) -> list[range]:
        """The clips of each batch, by their numbers."""
        count = len(self.prompts.texts)
        return [range(start, min(start + self.batch, count)) for start in range(0, count, self.batch)]

    def identity(self) -> dict[str, Any]:
        """What a clip depends on but its prompt, as JSON has it: the checkpoint by configurations and file sizes."""
        digest, folder = hashlib.sha256(), Path(self.model)
        for path in sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else ():
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
            if path.suffix == ".json":
                digest.update(path.read_bytes())
        return {
            "checkpoint": digest.hexdigest() if folder.is_dir() else self.model,
            "prompts": self.prompts.digest,
            "dtype": self.dtype,
            "device": self.device.split(":")[0],
            "steps": self.steps,
            "guidance": self.guidance,
            "batch": self.batch,
            "schedule": self.schedule and hashlib.sha256(Path(self.schedule).read_bytes()).hexdigest(),
        }

    def claim(self, work: Path) -> str:
        """The run's name, kept in the folder `work` with what it is of: stopping and resuming is one run.

        More clips than before are another run, which makes only what is not there.

        Raises:
            ValueError: for a folder of another setting; names what differs.
        """
        path, ours = work / "setting.json", self.identity()
        if not path.exists():
            write_whole(path, json.dumps({"run": uuid.uuid4().hex[:12], **ours}, indent=2).encode())
        there = json.loads(path.read_text(encoding="utf-8"))
        other = [
            f"{name}: {there.get(name)} there, {value} here" for name, value in ours.items() if there.get(name) != value
        ]
        if other:
            raise ValueError(f"--work {work} is of another comparison ({'; '.join(other)}): name another folder")
        return f"{there['run']}-{len(self.prompts.texts)}"


def check_evaluations(evaluations: list[int], steps: int) -> None:
    """Raise a ValueError for numbers of evaluations that no generation of `steps` steps can have."""
    wrong = [k for k in evaluations if not LEAST <= k <= steps]
    if wrong:
        raise ValueError(f"--evaluations {','.join(map(str, wrong))} must be {LEAST} to {steps}, the number of steps")
