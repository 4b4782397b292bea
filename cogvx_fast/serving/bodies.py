"""From the body of a request, JSON or a form, to its parameters and what was uploaded."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile

from . import references
from .errors import ApiError, of_pydantic
from .schemas import Create

_Schema = TypeVar("_Schema", bound=BaseModel)
_MAX_FIELDS = 50
_REFERENCE = "input_reference"


async def read_create(request: Request) -> tuple[dict[str, Any], bytes | None]:
    """Parameters of a request for a video, without what is not given, and the reference that came with it.

    Raises:
        ApiError: for a body that is none.
        BadReferenceError: for a reference that is no uploaded file or data URL.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    uploaded = None
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        values: dict[str, Any] = {}
        async with request.form(max_files=1, max_fields=_MAX_FIELDS, max_part_size=200_000) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if name != _REFERENCE:
                        raise ApiError(400, f"{name[:40]} is no file of this request", "unknown_parameter", name[:40])
                    uploaded = await value.read(references.MAX_BYTES + 1)
                elif name.startswith(_REFERENCE + "["):
                    values.setdefault(_REFERENCE, {})[name[len(_REFERENCE) + 1 :].rstrip("]")] = value
                else:
                    values[name] = value
    else:
        values = await read_json(request)
    asked = checked(Create, values).model_dump(exclude_none=True)
    reference = asked.pop(_REFERENCE, None)
    if uploaded is None and reference is not None:
        urls = list(reference.values())
        if len(urls) != 1:
            raise references.BadReferenceError("must have exactly one of image_url and video_url, a data URL")
        uploaded = references.from_data_url(urls[0])
    if uploaded is not None and len(uploaded) > references.MAX_BYTES:
        raise references.BadReferenceError(f"must be at most {references.MAX_BYTES >> 20} MiB")
    return asked, uploaded


async def read_json(request: Request) -> dict[str, Any]:
    """The JSON object of a request. Raises an ApiError for another body."""
    try:
        values = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is no JSON", "invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object", "invalid_json")
    return values


def checked(schema: type[_Schema], values: dict[str, Any]) -> _Schema:
    """The values by their schema. Raises an ApiError for those of another type."""
    try:
        return schema(**values)
    except ValidationError as error:
        raise of_pydantic(error.errors()[0]) from None
