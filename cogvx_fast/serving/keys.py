"""Who may use a server: keys in a file, as hashes. Taking a line out of it revokes the key at once."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
from dataclasses import dataclass
from pathlib import Path

from cogvx_fast.files import write_whole

_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})\s+sha256:([0-9a-f]{64})(?:\s+max-priority=(-?[0-9]{1,3}))?")
_PREFIX = "cvx-"
PRIORITIES = range(-100, 101)
DEFAULT_MAX_PRIORITY = 0  # a key may put itself behind others, not before them


@dataclass(frozen=True)
class _Entry:
    hash: str
    max_priority: int


class Keys:
    """The keys in a file: a line for each, `NAME sha256:HASH`, and behind it `max-priority=N` for those whose requests
    may go before others'. Empty lines and those that begin with # are skipped.

    Keys are random and long, so that their plain hash cannot be searched.

    Raises:
        ValueError: for a file that cannot be read, or a line that is none of these.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._stamp, self._entries = _stamp(path), _read(path)

    def owner(self, key: str) -> str | None:
        """The name of a key; None: there is none such."""
        digest, found = _hash(key), None
        for name, entry in self._now().items():  # all of them: how long it takes says nothing
            if hmac.compare_digest(digest, entry.hash):
                found = name
        return found

    def max_priority(self, name: str) -> int:
        """The highest that requests of a key may have."""
        entry = self._now().get(name)
        return DEFAULT_MAX_PRIORITY if entry is None else entry.max_priority

    def _now(self) -> dict[str, _Entry]:
        with self._lock:
            try:
                stamp = _stamp(self._path)
                if stamp != self._stamp:
                    self._entries, self._stamp = _read(self._path), stamp
            except ValueError:
                return {}  # a file that is broken lets nobody in
            return self._entries


def add_key(path: Path, name: str, max_priority: int = DEFAULT_MAX_PRIORITY) -> str:
    """Make a key, append its hash to the file, which is made if it is missing, and return it: it is nowhere else.

    Args:
        max_priority: of its requests, within `PRIORITIES`.

    Raises:
        ValueError: for a name that is taken, or is none; and for what `Keys` refuses.
        OSError: if the file cannot be written.
    """
    there = path.read_text(encoding="utf-8") if path.exists() else ""
    key = _PREFIX + secrets.token_urlsafe(32)
    line = f"{name} sha256:{_hash(key)}"
    if max_priority != DEFAULT_MAX_PRIORITY:
        line += f" max-priority={max_priority}"
    if _LINE.fullmatch(line) is None:
        raise ValueError(f"name {name!r} must be 1 to 64 letters, digits, dots, dashes and underscores")
    if name in (_read(path) if there else {}):
        raise ValueError(f"name {name!r} has a key already in {str(path)!r}; take its line out to revoke it")
    write_whole(path, (there + ("" if there.endswith("\n") or not there else "\n") + line + "\n").encode())
    path.chmod(0o600)
    return key


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise ValueError(f"keys file {str(path)!r} cannot be read ({error.strerror})") from None
    return status.st_mtime_ns, status.st_size


def _read(path: Path) -> dict[str, _Entry]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"keys file {str(path)!r} cannot be read ({error})") from None
    found: dict[str, _Entry] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        most = DEFAULT_MAX_PRIORITY if match is None or match[3] is None else int(match[3])
        if match is None or match[1] in found or most not in PRIORITIES:
            raise ValueError(
                f"keys file {str(path)!r}, line {number}: must be NAME sha256:HASH, each name once, and may end in"
                f" max-priority=N, {PRIORITIES[0]} to {PRIORITIES[-1]}; make one with `cogvx-fast serve-key`"
            )
        found[match[1]] = _Entry(match[2], most)
    return found
