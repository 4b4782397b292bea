"""What one request may take: bytes and time of its body. An ASGI middleware, as only that sees a body on its way."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, answer


class BodyLimits:
    """Answers 413 to a body of more than `max_bytes`, 408 to one that takes longer than `max_seconds` to come."""

    def __init__(self, app: ASGIApp, max_bytes: int, max_seconds: float) -> None:
        self._app, self._max_bytes, self._max_seconds = app, max_bytes, max_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        too_large = ApiError(413, f"the body must be at most {self._max_bytes} bytes", "too_large")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_bytes:
            await answer(too_large)(scope, receive, send)
            return
        received, complete, until = 0, False, time.monotonic() + self._max_seconds
        failed: ApiError | None = None
        answered = False

        async def limited() -> Message:
            nonlocal received, complete, failed
            if complete:
                return await receive()  # whether the client has gone
            try:
                message = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
            except TimeoutError:
                failed = ApiError(408, f"the body took longer than {self._max_seconds:g} s", "too_slow")
                raise _Refused from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > self._max_bytes:
                failed = too_large
                raise _Refused
            return message

        async def noted(message: Any) -> None:
            nonlocal answered
            if failed is None:
                answered = True
                await send(message)

        with contextlib.suppress(_Refused):
            await self._app(scope, limited, noted)
        if failed is not None and not answered:
            await answer(failed)(scope, receive, send)


class _Refused(Exception):  # noqa: N818 - ends the reading of a body, whoever reads
    pass
