"""A line of the log for each request: an ASGI middleware, as only that sees when an answer has gone out."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .logs import logger

_ASKED_ALL_THE_TIME = ("/healthz", "/readyz", "/metrics")  # by machines; only what goes wrong there is said
_CUT_OFF = 499  # nginx's code for a client that left before there was an answer
_LONGEST = 500  # characters of a path


class RequestsLog:
    """Says method, path (without the query), status and seconds, and the key's name and the job, which routes put into
    `request.state.about`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), _CUT_OFF
        about: dict[str, object] = {}
        scope.setdefault("state", {})["about"] = about

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            status = 500 if status == _CUT_OFF else status
            raise
        finally:
            path = scope["path"][:_LONGEST]
            if path not in _ASKED_ALL_THE_TIME or status >= 500:
                about |= {"method": scope["method"], "path": path, "status": status}
                about["seconds"] = round(time.monotonic() - started, 3)
                logger.info("request", extra=about)
