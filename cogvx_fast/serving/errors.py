"""What a request is answered that cannot be served: OpenAI's body, with the parameter and a code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from cogvx_fast.cli.console import UsageError

from .jobs import StorageFullError
from .logs import logger
from .references import BadReferenceError

_INVALID, _SERVER = "invalid_request_error", "server_error"
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large", 415: "unsupported_media_type"}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        code: for programs.
        param: of the request, which it is about.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers


def body(status: int, message: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    kind = _SERVER if status >= 500 else _INVALID
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def answer(error: ApiError) -> JSONResponse:
    content = body(error.status, error.message, error.code, error.param)
    return JSONResponse(content, error.status, headers=dict(error.headers or {}))


def add_handlers(app: FastAPI) -> None:
    """Every exception becomes such a body."""

    @app.exception_handler(ApiError)
    def of_the_api(_: Request, error: ApiError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(UsageError)
    def of_a_value(_: Request, error: UsageError) -> JSONResponse:
        return answer(ApiError(400, str(error), "invalid_value", error.argument))

    @app.exception_handler(BadReferenceError)
    def of_a_reference(_: Request, error: BadReferenceError) -> JSONResponse:
        return answer(ApiError(400, f"input_reference {error}", "invalid_reference", "input_reference"))

    @app.exception_handler(StorageFullError)
    def of_the_disk(_: Request, error: StorageFullError) -> JSONResponse:
        logger.warning("%s", error)
        return answer(
            ApiError(507, f"no new videos can be taken: {error}", "storage_full", headers={"Retry-After": "60"})
        )

    @app.exception_handler(RequestValidationError)
    def of_a_parameter(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return answer(of_pydantic(first))

    @app.exception_handler(ClientDisconnect)
    def of_nobody(_: Request, error: ClientDisconnect) -> JSONResponse:
        """Whoever asked went away in the middle of a request: that is no failure, and nobody hears this."""
        return answer(ApiError(400, "the request did not come to its end", "incomplete"))

    @app.exception_handler(HTTPException)
    def of_http(_: Request, error: HTTPException) -> JSONResponse:
        code = _CODES.get(error.status_code, "invalid_request")
        return answer(ApiError(error.status_code, str(error.detail), code, headers=error.headers))

    @app.exception_handler(Exception)
    def of_ours(_: Request, error: Exception) -> JSONResponse:
        return answer(ApiError(500, "the server failed; its log says why", "internal_error"))


def of_pydantic(found: Mapping[str, Any]) -> ApiError:
    """The answer to a value of another type than the schema's."""
    names = [str(name) for name in found["loc"] if name not in ("body", "query", "path")]
    param = names[0] if names else None
    if found["type"] == "extra_forbidden":
        return ApiError(400, f"{param} is no parameter of this request", "unknown_parameter", param)
    if found["type"] == "missing":
        return ApiError(400, f"{param} is missing", "missing_parameter", param)
    return ApiError(400, f"{param}: {found['msg']}", "invalid_type", param)
