"""Webhooks: where a server may say that a video ended, how it signs that, and one delivery.

Signed as the Standard Webhooks specification (standardwebhooks.com) has it, with events as OpenAI's.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import http.client
import json
import os
import re
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

TIMEOUT = 10.0  # seconds, of a whole delivery
MAX_URL = 2048  # characters
_PREFIX = "whsec_"
_PORTS = {"https": 443, "http": 80}
_HOST = re.compile(r"(?:(https?)://)?([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?", re.IGNORECASE)
_LOOPBACK = re.compile(r"localhost|127(?:\.[0-9]{1,3}){3}|::1")
_PRINTABLE = re.compile(r"[!-~]+")


class BadAddressError(ValueError):
    """An address that no event may be sent to."""


@dataclass(frozen=True)
class Place:
    """A scheme, host and port; what follows in an address is its owner's."""

    scheme: str
    host: str
    port: int


def places(allowed: str) -> set[Place]:
    """What `--callback-host` allows: `HOST` (https), `HOST:PORT`, or either with `http://` or `https://` before it. A
    name of this machine alone (localhost, 127.0.0.1, [::1]) is allowed both.

    Raises:
        ValueError: for something else.
    """
    found = _HOST.fullmatch(allowed)
    port = None if found is None or found[3] is None else int(found[3])
    if found is None or (port is not None and not 0 < port < 65536):
        raise ValueError(f"{allowed!r} must be HOST or HOST:PORT, with or without https:// or http:// before it")
    host = found[2].strip("[]").lower()
    both = ("https", "http") if _LOOPBACK.fullmatch(host) else ("https",)
    schemes = both if found[1] is None else (found[1].lower(),)
    return {Place(scheme, host, port or _PORTS[scheme]) for scheme in schemes}


class Callbacks:
    """Where events may be sent, and with which secret they are signed.

    Args:
        hosts: as `--callback-host`.
        secret: `whsec_` and base64.
        context: of TLS; None: the system's authorities.

    Raises:
        ValueError: for a host or a secret that is none.
    """

    def __init__(self, hosts: Iterable[str], secret: str, context: ssl.SSLContext | None = None) -> None:
        self._hosts = list(hosts)
        self._places = {place for host in self._hosts for place in places(host)}
        self._key = _key(secret)
        self._context = context

    def check(self, url: str) -> None:
        """Raise a BadAddressError for an address that is not allowed.

        The allow list is the rule: scheme, host and port must be one of it. Whom a name of it leads to is for who put
        it there; nothing is resolved here, and no redirect leads elsewhere.
        """
        self._parts(url)

    def _parts(self, url: str) -> tuple[Place, str]:
        if len(url) > MAX_URL or _PRINTABLE.fullmatch(url) is None:
            raise BadAddressError(f"must be at most {MAX_URL} printable ASCII characters")
        try:
            parts = urlsplit(url)
            scheme, host, port = parts.scheme, (parts.hostname or "").lower(), parts.port
        except ValueError:
            raise BadAddressError("is no address") from None
        if scheme not in _PORTS or not host:
            raise BadAddressError("must begin with https://HOST")
        if "@" in parts.netloc or "#" in url or "\\" in url:
            raise BadAddressError("must have no user, no password and no fragment")
        place = Place(scheme, host, _PORTS[scheme] if port is None else port)
        if place not in self._places:
            raise BadAddressError(f"is not on this server's list: {', '.join(self._hosts)} (--callback-host)")
        return place, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")

    def headers(self, event_id: str, body: bytes) -> dict[str, str]:
        """The headers that sign an event at this moment."""
        at = str(int(time.time()))
        signed = hmac.new(self._key, b".".join((event_id.encode(), at.encode(), body)), hashlib.sha256).digest()
        return {
            "Content-Type": "application/json",
            "User-Agent": "cogvx_fast",
            "webhook-id": event_id,
            "webhook-timestamp": at,
            "webhook-signature": "v1," + base64.b64encode(signed).decode(),
        }

    def send(self, url: str, event_id: str, body: bytes) -> int:
        """Post an event; the status of the answer, whose body is not read.

        Raises:
            BadAddressError: for an address that is not allowed (any more).
            OSError, http.client.HTTPException: where there is no answer in time.
        """
        place, target = self._parts(url)
        connection = (
            http.client.HTTPSConnection(place.host, place.port, timeout=TIMEOUT, context=self._context)
            if place.scheme == "https"
            else http.client.HTTPConnection(place.host, place.port, timeout=TIMEOUT)
        )
        # The timeout is of each read; whoever sends a byte now and then would hold it for ever.
        late = threading.Timer(TIMEOUT, _hang_up, (connection,))
        late.daemon = True
        late.start()
        try:
            connection.request("POST", target, body, self.headers(event_id, body))
            return connection.getresponse().status
        finally:
            late.cancel()
            connection.close()


def _hang_up(connection: http.client.HTTPConnection) -> None:
    with contextlib.suppress(OSError, AttributeError):  # not connected yet, or not any more
        connection.sock.shutdown(socket.SHUT_RDWR)


def event_id(job_id: str) -> str:
    """The id of a job's event: the same in every try, so that a receiver knows what it had."""
    return "evt_" + hashlib.sha256(job_id.encode()).hexdigest()[:32]


def event(job_id: str, completed: bool, at: float) -> bytes:
    """The body that says that a job ended, at a time of day."""
    content = {
        "id": event_id(job_id),
        "object": "event",
        "created_at": int(at),
        "type": "video.completed" if completed else "video.failed",
        "data": {"id": job_id},
    }
    return json.dumps(content, separators=(",", ":")).encode()


def secret_in(path: Path) -> str:
    """The secret in a file, which is made, for its owner's eyes, if it is missing.

    Raises:
        ValueError: for a file of something else.
        OSError: if it cannot be read or written.
    """
    with contextlib.suppress(FileExistsError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            made = _PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()
            _write_once(path, made)
    secret = path.read_text(encoding="utf-8", errors="replace").strip()
    try:
        _key(secret)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from None
    return secret


def _write_once(path: Path, secret: str) -> None:
    """Whole or not at all, and not over what another server wrote at this moment: raises a FileExistsError then."""
    beside = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secret + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _key(secret: str) -> bytes:
    try:
        key = base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not secret.startswith(_PREFIX) or not 24 <= len(key) <= 64:
        raise ValueError(f"is no secret of webhooks: must be {_PREFIX} and 24 to 64 bytes in base64")
    return key
