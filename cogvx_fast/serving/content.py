"""Answers that are files: whole or a part of it (Range), with an ETag, as their bytes never change."""

from __future__ import annotations

import re

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from .context import Context
from .errors import ApiError
from .jobs import COMPLETED, FAILED, Job
from .variants import VARIANTS, size_of

_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


def content(context: Context, job: Job, name: str, request: Request) -> Response:
    """The file of a completed job, in the variant of that name.

    Raises:
        ApiError: 400 for a variant that there is not, 409 for a job that is not completed, 404 where its file is gone,
            416 for a range beyond the file.
    """
    variant = VARIANTS.get(name)
    if variant is None:
        raise ApiError(400, f"variant {name[:40]!r} must be one of {', '.join(VARIANTS)}", "invalid_value", "variant")
    if job.status != COMPLETED:
        why = "failed" if job.status == FAILED else "is not completed yet"
        raise ApiError(409, f"the video {why}", "not_completed", "video_id")
    size = size_of(context.store, context.files, job, variant)
    if size is None:
        raise ApiError(404, "the file of this video is gone", "not_found", "video_id")
    etag = f'"{job.id}.{variant.name}"'  # what an id names is made once
    headers = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=86400, immutable",
        "Content-Disposition": f'inline; filename="{job.id}{variant.name[variant.name.rindex(".") :]}"',
        "X-Content-Type-Options": "nosniff",
    }
    if etag in re.split(r"\s*,\s*", request.headers.get("if-none-match", "")):
        return Response(status_code=304, headers=headers)
    start, end, status = 0, size, 200
    wanted = request.headers.get("range")
    if wanted is not None and request.headers.get("if-range", etag) == etag:
        part = _part(wanted, size)
        if part is not None:
            (start, end), status = part, 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    headers["Content-Length"] = str(end - start)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=variant.media_type)
    pieces = context.files.pieces(job.id, variant.name, start, end)
    return StreamingResponse(pieces, status, headers=headers, media_type=variant.media_type)


def _part(wanted: str, size: int) -> tuple[int, int] | None:
    """First byte, and the one behind the last, of a Range header; None for what is no single range: then it is all."""
    found = _RANGE.fullmatch(wanted.strip())
    if found is None or not (found[1] or found[2]):
        return None
    if not found[1]:
        start, end = max(0, size - int(found[2])), size
    else:
        start, end = int(found[1]), min(size, int(found[2]) + 1) if found[2] else size
        if found[2] and int(found[2]) < int(found[1]):
            return None
    if start >= size or start >= end:
        raise ApiError(
            416, f"the file has {size} bytes", "invalid_range", "Range", headers={"Content-Range": f"bytes */{size}"}
        )
    return start, end
