"""The page at `/`: plain files that use the API as everybody else does, and what they ask of the server besides."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any

from fastapi import FastAPI, Header, Request, Response
from fastapi.responses import JSONResponse

from cogvx_fast import __version__

from .about import about
from .context import Context
from .errors import ApiError

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_INDEX = "index.html"
# Nothing but the page's own files runs or is asked; pictures and videos also come as data.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:;"
    " connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors "
)
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.-]{1,253}(:[0-9]{1,5})?")


@dataclass(frozen=True)
class _File:
    data: bytes
    media_type: str

    @property
    def etag(self) -> str:
        return f'"{hashlib.sha256(self.data).hexdigest()[:32]}"'


def is_origin(text: str) -> bool:
    """Whether it names a web site, such as https://example.org, and nothing behind it."""
    return _ORIGIN.fullmatch(text) is not None


def mount(app: FastAPI, context: Context) -> None:
    """Add the page to the application of a server.

    Its files are read once: no request reaches the file system. Browsers keep them but ask whether they are still
    those, as files of two versions of the page do not fit together.
    """
    folder = resources.files(__package__) / "page"
    files = {
        item.name: _File(item.read_bytes(), _TYPES[item.name.rpartition(".")[2]])
        for item in folder.iterdir()
        if item.is_file()
    }
    policy = _POLICY + " ".join(("'self'", *context.embedded_in))

    def answer(request: Request, name: str) -> Response:
        file = files.get(name)
        if file is None:
            raise ApiError(404, f"the page has no file {name[:40]!r}", "not_found")
        headers = {
            "ETag": file.etag,
            "Cache-Control": "no-cache",
            "Content-Security-Policy": policy,
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        if file.etag in re.split(r"\s*,\s*", request.headers.get("if-none-match", "").replace("W/", "")):
            return Response(status_code=304, headers=headers)
        return Response(file.data, media_type=file.media_type, headers=headers)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    def get_page(request: Request) -> Response:
        return answer(request, _INDEX)

    @app.get("/page/about", include_in_schema=False)
    def get_about(authorization: Annotated[str | None, Header()] = None) -> JSONResponse:
        """Who has no key is told that one is needed, which is no failure that browsers would log."""
        said: dict[str, Any]
        try:
            context.owner(authorization)
        except ApiError:
            said = {"key_needed": True}
        else:
            said = {"version": __version__, "ready": context.is_ready(), "models": list(map(about, context.models))}
        return JSONResponse(said, headers={"Cache-Control": "no-store"})

    @app.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    def get_file(request: Request, name: str) -> Response:
        return answer(request, name)
