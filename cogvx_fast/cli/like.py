"""`--like VIDEO`: the options that a video was made with, which it carries in itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .console import UsageError
from .order import Asked


def like(path: Path, asked: Asked, given: Collection[str]) -> Asked:
    """`asked`, where what was not given is as in a video.

    Args:
        given: the names of the options that were.

    Raises:
        UsageError: for a file that is none of ours.
    """
    from cogvx_fast import metadata

    try:
        found = metadata.read(path)
    except OSError as error:
        raise UsageError("--like", repr(str(path)), f"cannot be read ({error.strerror})") from None
    except ValueError:
        raise UsageError("--like", repr(str(path)), "carries no settings of this command") from None
    taken: dict[str, Any] = {}
    for field in dataclasses.fields(Asked):
        if field.name not in found or field.name in given:
            continue
        if field.name == "prompt" and "prompt_file" in given:
            continue
        if field.name == "original_prompt" and {"prompt", "prompt_file"} & set(given):
            continue  # it belongs to the other prompt
        try:
            taken[field.name] = _as_option(found[field.name], str(field.type))
        except ValueError:
            words = f"carries a {field.name} that is none: {str(found[field.name])[:80]!r}"
            raise UsageError("--like", repr(str(path)), words) from None
    return dataclasses.replace(asked, **taken)


def _as_option(value: Any, kind: str) -> Any:
    """A value out of a file as an option of the type `kind`, such as "int | None"; a ValueError if it is none."""
    if kind.startswith("tuple"):
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            return tuple(value)
        raise ValueError
    if "bool" in kind or isinstance(value, bool):
        if "bool" in kind and isinstance(value, bool):
            return value
        raise ValueError
    if "Path" in kind and isinstance(value, str):
        return Path(value)
    allowed = tuple(known for name, known in (("str", str), ("int", int), ("float", int | float)) if name in kind)
    if not any(isinstance(value, known) for known in allowed):
        raise ValueError
    return value
