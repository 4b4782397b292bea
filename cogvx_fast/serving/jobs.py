"""What a job is: one video that somebody wants, how far it is, and what a worker hears about it."""

from __future__ import annotations

import enum
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

QUEUED, IN_PROGRESS, COMPLETED, FAILED = "queued", "in_progress", "completed", "failed"
CANCELLED = "cancelled"  # the code of a failed job that was cancelled: clients know no other end


class StorageFullError(Exception):
    """There is no room for another job, or for what one made."""


@dataclass(frozen=True)
class Job:
    """One video that somebody wants. Times are seconds since the epoch.

    Attributes:
        owner: who may see it; "" where there are no keys.
        request: an `orders.Order`, as a dictionary.
        model: of it, by its name: only workers that have it take the job.
        priority: a higher one goes first.
        not_before: when it may be taken; 0: at once.
        done, total: denoising steps.
        kills: how many workers died while they made it.
        lease_seconds, beats: for which its lease was given, and how often that was kept.
        cancel: whether its worker is to stop.
        busy_seconds: of a device that it has had.
        result: `stage_seconds` and `made_steps` of those workers that did not die, `warnings`; of a completed job also
            `engine_report`.
        bytes: of its files.
    """

    id: str
    owner: str
    request: Mapping[str, Any]
    model: str = ""
    status: str = QUEUED
    priority: int = 0
    created_at: float = field(default_factory=time.time)
    started_at: float | None = None
    completed_at: float | None = None
    not_before: float = 0.0
    done: int = 0
    total: int = 0
    kills: int = 0
    worker: str | None = None
    lease: str | None = None
    lease_seconds: float | None = None
    beats: int = 0
    cancel: bool = False
    busy_seconds: float = 0.0
    error_code: str | None = None
    error_message: str | None = None
    result: Mapping[str, Any] = field(default_factory=dict)
    bytes: int = 0
    remixed_from: str | None = None

    @property
    def ended(self) -> bool:
        return self.status in (COMPLETED, FAILED)


class Signal(enum.Enum):
    """What a worker hears when it says how far it is."""

    GO_ON = "go on"
    CANCEL = "cancel"
    LOST = "lost"  # the job is another's now, or gone


def new_id() -> str:
    """The id of a job, which nobody can guess: 192 random bits."""
    return f"video_{secrets.token_hex(24)}"
