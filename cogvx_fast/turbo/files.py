"""Schedules on disk: JSON with what they were found for, how, and what came of it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files import write_whole
from .identity import Identity
from .schedule import Distance, ScheduleError, StepSchedule

FORMAT = "cogvx_fast schedules, 1"
MOST_BYTES = 2**22


@dataclass(frozen=True)
class ScheduleFile:
    """Schedules of one checkpoint and scheduler, one for each number of evaluations.

    Attributes:
        found: how they were, in words by name: prompts, size, guidance, dtype, versions.
        schedules: all of the same steps, by number of evaluations.
    """

    identity: Identity
    found: dict[str, Any]
    schedules: dict[int, StepSchedule]

    @property
    def timesteps(self) -> tuple[float, ...]:
        return next(iter(self.schedules.values())).timesteps

    def for_evaluations(self, evaluations: int) -> StepSchedule:
        """The schedule with that many evaluations, or the nearest that there is above, or else below."""
        there = sorted(self.schedules)
        return self.schedules[next((n for n in there if n >= evaluations), there[-1])]

    def write(self, path: Path) -> None:
        """Write it whole or not at all.

        Raises:
            OSError: if it cannot be written.
        """
        schedules = [self.schedules[number].to_json() for number in sorted(self.schedules)]
        content = {
            "format": FORMAT,
            "identity": asdict(self.identity),
            "found": self.found,
            "timesteps": list(self.timesteps),
            "schedules": schedules,
        }
        write_whole(path, (_dump(content) + "\n").encode())

    @classmethod
    def read(cls, path: str | Path) -> ScheduleFile:
        """
        Raises:
            ScheduleError: for a file that is not there, is not one of ours, or makes no sense.
        """
        try:
            with Path(path).open("rb") as file:
                data = file.read(MOST_BYTES + 1)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ScheduleError(f"schedule {str(path)!r} cannot be read: {reason}") from None
        try:
            if len(data) > MOST_BYTES:
                raise ValueError(f"more than {MOST_BYTES} bytes")
            return cls._of(json.loads(data), f"{Path(path).name}")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            said = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
            reason = " ".join(said.split())[:300] or type(error).__name__
            raise ScheduleError(
                f"schedule {str(path)!r} is broken ({reason}); `cogvx-fast calibrate` writes such files"
            ) from None

    @classmethod
    def _of(cls, content: Any, name: str) -> ScheduleFile:
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        identity = Identity(**content["identity"])
        identity = Identity(
            dict(identity.transformer),
            tuple(map(float, identity.weights)),
            str(identity.scheduler),
            dict(identity.scheduler_config),
        )
        timesteps, found = tuple(map(float, content["timesteps"])), dict(content["found"])
        in_dtype = f" in {found['dtype']}" if "dtype" in found else ""  # of which a distance is
        schedules = {}
        for entry in content["schedules"]:
            distance = Distance(**entry["distance"]) if "distance" in entry else None
            weights = {
                int(step): (float(a), float(b), float(c)) for step, (a, b, c) in entry.get("weights", {}).items()
            }
            source = f"calibrated{in_dtype}, {name}"
            schedule = StepSchedule(str(entry["strip"]), timesteps, weights, source=source, distance=distance)
            if schedule.evaluations != entry["evaluations"]:
                raise ValueError(f"strip {schedule.strip!r} has not {entry['evaluations']} evaluations")
            schedules[schedule.evaluations] = schedule
        if not schedules:
            raise ValueError("it holds no schedule")
        return cls(identity, found, schedules)


def _dump(content: dict[str, Any]) -> str:
    """JSON in which one reads the strips below each other: indented, but for lists of numbers."""
    text = json.dumps(content, indent=1)
    lines: list[str] = []
    inside = ""
    for line in text.splitlines():
        stripped = line.strip()
        if inside:
            inside += (" " if not inside.endswith("[") and not stripped.startswith("]") else "") + stripped
            if stripped.startswith("]"):
                lines.append(inside)
                inside = ""
        elif line.endswith("[") and not stripped.startswith('"schedules"'):
            inside = line
        else:
            lines.append(line)
    return "\n".join(lines)
