"""Other web sites: a page that somebody has open elsewhere must not ask a server without keys for videos."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError, answer

_HARMLESS = ("GET", "HEAD", "OPTIONS")


class OwnNames:
    """Answers 403 to requests for another host than this machine, and to those that another site's page sends.

    A browser sends forms of any site anywhere, with an `Origin`. By a name of its own that it lets point here, a site's
    page would also read what is answered; `Host` tells that name.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin", b"").decode("latin-1")
        refused = None
        if not is_own(f"//{host}"):
            refused = f"Host {host[:80]!r} is no name of this machine; behind a proxy serve with keys, or --insecure"
        elif origin and scope["method"] not in _HARMLESS and urlsplit(origin).netloc != host:
            refused = f"a page of {origin[:80]!r} may not ask this server"
        if refused is not None:
            await answer(ApiError(403, refused, "foreign_origin"))(scope, receive, send)
            return
        await self._app(scope, receive, send)


def is_own(url: str) -> bool:
    """Whether a URL names this machine itself: localhost, or an address of its own loop."""
    try:
        name = urlsplit(url).hostname or ""
        return name == "localhost" or name.endswith(".localhost") or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
