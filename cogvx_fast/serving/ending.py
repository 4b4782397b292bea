"""What a request is answered that is not done when the server ends. An ASGI middleware."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError, answer

_ENDING = ApiError(
    503,
    "the server is ending and could not wait for this request; if it asked for a video, GET /v1/videos says whether"
    " that was taken",
    "server_ending",
    headers={"Retry-After": "5"},
)


class AnswersAtTheEnd:
    """Answers 503 to a request that is broken off as the server ends, where it has not been answered yet."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answered = scope["type"] != "http"

        async def noted(message: Any) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if answered or task is None:
                raise
            task.uncancel()
            await answer(_ENDING)(scope, receive, send)
