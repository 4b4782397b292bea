"""`--parallel`: by how many processes each part of a video is shared out."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from .console import UsageError

if TYPE_CHECKING:
    from cogvx_fast import ParallelConfig


def parse(text: str | None, processes: int, heads: int) -> ParallelConfig | str:
    """What the option asks for; None: "auto".

    Args:
        processes: that there are.
        heads: of the checkpoint's attention.

    Raises:
        UsageError: for what names no degrees, or such as cannot be.
    """
    if text is None or text == "auto":
        return "auto"
    from cogvx_fast import ParallelConfig
    from cogvx_fast.parallel.degrees import check

    names = {field.name for field in dataclasses.fields(ParallelConfig)}
    given: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in names or not value:
            raise UsageError("--parallel", repr(text), "must be auto, or degrees such as guidance=2,ulysses=2,ring=1")
        given[name] = _value(name, value)
    try:
        made = ParallelConfig(**given)
        check(made, processes, heads)
        return made
    except ValueError as error:
        raise UsageError("--parallel", repr(text), str(error)) from None


def _value(name: str, text: str) -> int | bool | str:
    """As `ParallelConfig` takes it; what is none of its values it refuses by itself."""
    if name == "shard_weights":
        return {"true": True, "false": False}.get(text.lower(), text)
    return int(text) if name != "payload" and text.isascii() and text.isdecimal() and len(text) < 10 else text
