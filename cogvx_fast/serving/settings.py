"""What a server and its workers are told at their start."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What workers are told at their start; times in seconds.

    Attributes:
        model: folder or Hub id of the checkpoint.
        store, files: URLs of the jobs' database and of the videos' place.
        device: of this worker; several, with commas between, make each video together, by a process for each.
        dtype: of the model.
        parallel: how they share it out, as the command line has it; None: "auto".
        engine, memory_limit: as the command line has them.
        threads: of a CPU; None: as many as torch takes.
        lease_seconds: after which a worker that said nothing counts as dead.
        checkpoint_seconds: between two checkpoints of a job.
        poll_seconds: between two looks into the queue.
        drain_seconds: that a worker has to end in when it is told to.
        preview_seconds: between two pictures of a video on its way.
        patience: see `scheduler`.
        cached_texts: how many embeddings of texts are kept.
        name: of the model, as jobs have it.
        worker: its id; "": one that it chooses.
    """

    model: str
    store: str
    files: str
    device: str = "cpu"
    dtype: str = "float32"
    engine: str | None = None
    memory_limit: str | None = None
    threads: int | None = None
    lease_seconds: float = 30.0
    checkpoint_seconds: float = 30.0
    poll_seconds: float = 0.1
    drain_seconds: float = 8.0
    preview_seconds: float = 1.0
    patience: float = 600.0
    cached_texts: int = 64
    name: str = ""
    worker: str = ""
    parallel: str | None = None

    @property
    def devices(self) -> tuple[str, ...]:
        """The device of each process of this worker."""
        return tuple(self.device.split(","))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        return cls(**json.loads(text))
