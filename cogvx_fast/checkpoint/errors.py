"""What is wrong with a checkpoint, in one sentence."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be used.

    Attributes:
        reason: what is wrong and what would help; the message has the checkpoint's or the file's name before it.
    """

    def __init__(self, reason: str, source: object = None) -> None:
        self.reason = reason
        super().__init__(reason if source is None else f"{source}: {reason}")


def said(error: Exception) -> str:
    """What a library died of, in one line: whatever it makes of a value of the wrong type."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
