"""Videos that come with a request: decoded within limits, as whoever made them may mean harm."""

from __future__ import annotations

import base64
import binascii
import re
from io import BytesIO
from pathlib import Path

import av
from PIL import Image

from cogvx_fast.pictures import fitted

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 2048 * 2048  # of a frame
MAX_FRAMES = 500
_DATA = re.compile(r"data:(?:video|image)/[a-z0-9.+-]{1,40};base64,")


class BadReferenceError(ValueError):
    """What came is no video or picture that can be used."""


def from_data_url(url: str) -> bytes:
    """The bytes of a data URL; of no other, as nothing is fetched for a request.

    Raises:
        BadReferenceError: for another URL, and for too many bytes.
    """
    head = _DATA.match(url)
    if head is None:
        raise BadReferenceError("must be an uploaded file or its base64 data URL; addresses are not fetched")
    if len(url) > MAX_BYTES * 4 // 3 + 100:
        raise BadReferenceError(f"must be at most {MAX_BYTES >> 20} MiB")
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise BadReferenceError("its data URL is not base64") from None


def frames(
    source: bytes | Path, width: int | None = None, height: int | None = None, most: int = MAX_FRAMES
) -> list[Image.Image]:
    """The first frames of a video as RGB images.

    Args:
        width, height: pixels to which frames are scaled and, in the middle, cut; None: as they are.
        most: so many at most.

    Raises:
        BadReferenceError: for what is no video, and for frames that are too large.
    """
    found = []
    try:
        with av.open(BytesIO(source) if isinstance(source, bytes) else str(source), "r") as container:
            if not container.streams.video:
                raise BadReferenceError("has no pictures in it")
            stream = container.streams.video[0]
            if stream.width * stream.height > MAX_PIXELS:
                raise BadReferenceError(f"has {stream.width}x{stream.height} pixels; must be at most {MAX_PIXELS}")
            for frame in container.decode(stream):
                if frame.width * frame.height > MAX_PIXELS:
                    raise BadReferenceError(f"has {frame.width}x{frame.height} pixels; must be at most {MAX_PIXELS}")
                image = frame.to_image()
                found.append(image if width is None or height is None else fitted(image, width, height))
                if len(found) == most:
                    break
    except (av.FFmpegError, ValueError, MemoryError) as error:
        if isinstance(error, BadReferenceError):
            raise
        raise BadReferenceError("cannot be decoded; must be a video such as MP4") from error
    if not found:
        raise BadReferenceError("has no frames")
    return found


def count_frames(source: bytes, most: int = MAX_FRAMES) -> int:
    """How many frames `frames` gives, up to `most`; raises as it does."""
    # As thumbnails: what is kept is of no use here.
    return len(frames(source, 16, 16, most))
