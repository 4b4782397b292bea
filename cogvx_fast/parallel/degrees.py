"""How a generation is split over processes: the degrees, and how they follow from the number of processes."""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

AUTO = "auto"


class Payload(enum.StrEnum):
    """In what Q, K, V and the attended values travel between the processes of `ParallelConfig.ulysses`."""

    NATIVE = "native"  # as they are
    INT8 = "int8"  # each row of a head in 8 bits with a scale of its own: about half the bytes of half precision


@dataclass(frozen=True)
class ParallelConfig:
    """How several processes share out one generation: by how many each part of it is split.

    `guidance * ulysses * ring` is the number of processes.

    Attributes:
        guidance: the batch's parts, with guidance its two halves: next to no traffic.
        ulysses: parts of the `[text; video]` stream that exchange heads for rows at each attention (DeepSpeed-Ulysses,
            arXiv:2309.14509); must divide the number of heads.
        ring: parts of the stream whose keys and values go round (Ring Attention, arXiv:2310.01889), where heads run
            out.
        vae: bands of rows of the frames, each decoded and encoded by one process: all processes or 1; None: all.
        payload: a `Payload` or its value. "int8" is not for tier "exact".
        shard_weights: each process holds a part of the transformer's weights, and those of a block come together when
            it runs (torch's FSDP2): for cards that cannot hold them all.

    Raises:
        ValueError: for a degree that is no whole number from 1, and for bands that are neither 1 nor all.
    """

    guidance: int = 1
    ulysses: int = 1
    ring: int = 1
    vae: int | None = None
    payload: Payload | str = Payload.NATIVE
    shard_weights: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("payload", "shard_weights") or (field.name == "vae" and value is None):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 4096:
                raise ValueError(f"ParallelConfig.{field.name}={value!r:.100} must be a whole number, 1 to 4096")
        if self.vae not in (None, 1, self.processes):
            raise ValueError(
                f"ParallelConfig.vae={self.vae} must be 1 or all of the guidance * ulysses * ring = {self.processes}"
                " processes"
            )
        if self.payload not in list(map(str, Payload)):
            allowed = ", ".join(repr(str(payload)) for payload in Payload)
            raise ValueError(f"ParallelConfig.payload={self.payload!r:.100} is unknown; allowed: {allowed}")
        if not isinstance(self.shard_weights, bool):
            raise ValueError(f"ParallelConfig.shard_weights={self.shard_weights!r:.100} must be True or False")
        object.__setattr__(self, "vae", self.processes if self.vae is None else self.vae)
        object.__setattr__(self, "payload", Payload(self.payload))

    @property
    def sequence(self) -> int:
        """Parts of the stream."""
        return self.ulysses * self.ring

    @property
    def processes(self) -> int:
        return self.guidance * self.ulysses * self.ring

    def __str__(self) -> str:
        parts = {"guidance": self.guidance, "ulysses": self.ulysses, "ring": self.ring, "vae": self.vae}
        words = [f"{name} {number}" for name, number in parts.items() if number and number > 1]
        words += [f"{self.payload} payloads"] if self.payload is not Payload.NATIVE else []
        words += ["weights in parts"] if self.shard_weights else []
        return ", ".join(words) or "one process"


ALONE = ParallelConfig()


def choose(processes: int, heads: int, guided: bool) -> ParallelConfig:
    """Degrees for a number of processes: what has the least traffic first.

    Args:
        heads: of the transformer's attention.
        guided: whether a step's batch has two halves.
    """
    guidance = 2 if guided and processes % 2 == 0 else 1
    ulysses = math.gcd(processes // guidance, heads)
    return ParallelConfig(guidance, ulysses, processes // guidance // ulysses)


def check(config: ParallelConfig, processes: int, heads: int) -> None:
    """Raise a ValueError for degrees that this number of processes, or the model, cannot be split by; it says what can.

    Args:
        processes: that there are.
        heads: of the transformer's attention.
    """
    if config.processes != processes:
        raise ValueError(
            f"ParallelConfig: guidance={config.guidance} * ulysses={config.ulysses} * ring={config.ring} ="
            f" {config.processes} must be the number of processes, which is {processes}"
        )
    if heads % config.ulysses:
        divisors = [str(n) for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(
            f"ParallelConfig.ulysses={config.ulysses} must divide the transformer's {heads} heads:"
            f" {', '.join(divisors)}; for other numbers there is ring"
        )


def pieces(total: int, parts: int) -> list[int]:
    """How many of `total` things each of `parts` gets, in order: numbers that differ by at most one."""
    bounds = [total * i // parts for i in range(parts + 1)]
    return [last - first for first, last in itertools.pairwise(bounds)]


def video_pieces(rows: Sequence[int], text: int) -> list[int]:
    """Of the rows that each process has of `[text; video]`, how many are the video's."""
    ends = itertools.accumulate(rows)
    return [min(own, max(end - text, 0)) for own, end in zip(rows, ends, strict=True)]
