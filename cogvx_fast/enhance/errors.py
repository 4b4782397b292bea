"""Why there is no enhanced prompt."""

from __future__ import annotations


class EnhanceError(Exception):
    """There is none; says why in a line that holds no key.

    Attributes:
        status: of HTTP, where a server gave one.
    """

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


class UnansweredError(EnhanceError):
    """Nothing answered, or with nothing that can be used: it may be otherwise later."""


class RefusedError(EnhanceError):
    """It cannot work as it is set up: no such model, a wrong key, a model that cannot be loaded."""
