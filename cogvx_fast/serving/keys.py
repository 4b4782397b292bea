"""Who may use a server: keys in a file, as hashes. Taking a line out of it revokes the key at once."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
from pathlib import Path

from cogvx_fast.files import write_whole

_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})\s+sha256:([0-9a-f]{64})")
_PREFIX = "cvx-"


class Keys:
    """The keys in a file: a line for each, `NAME sha256:HASH`. Empty lines and those that begin with # are skipped.

    Keys are random and long, so that their plain hash cannot be searched.

    Raises:
        ValueError: for a file that cannot be read, or a line that is none of these.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._stamp, self._hashes = _stamp(path), _read(path)

    def owner(self, key: str) -> str | None:
        """The name of a key; None: there is none such."""
        with self._lock:
            try:
                stamp = _stamp(self._path)
                if stamp != self._stamp:
                    self._hashes, self._stamp = _read(self._path), stamp
            except ValueError:
                return None  # a file that is broken lets nobody in
            hashes = self._hashes
        digest, found = _hash(key), None
        for name, known in hashes.items():  # all of them: how long it takes says nothing
            if hmac.compare_digest(digest, known):
                found = name
        return found


def add_key(path: Path, name: str) -> str:
    """Make a key, append its hash to the file, which is made if it is missing, and return it: it is nowhere else.

    Raises:
        ValueError: for a name that is taken, or is none; and for what `Keys` refuses.
        OSError: if the file cannot be written.
    """
    there = path.read_text(encoding="utf-8") if path.exists() else ""
    key = _PREFIX + secrets.token_urlsafe(32)
    line = f"{name} sha256:{_hash(key)}"
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


def _read(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"keys file {str(path)!r} cannot be read ({error})") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None or match[1] in found:
            raise ValueError(
                f"keys file {str(path)!r}, line {number}: must be NAME sha256:HASH, each name once; make one with"
                " `cogvx-fast serve-key`"
            )
        found[match[1]] = match[2]
    return found
