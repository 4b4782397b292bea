"""Pictures that come with a request: decoded once, within limits, and kept as a plain PNG of the video's size, so that
what makes the video never reads what somebody sent."""

from __future__ import annotations

import threading
from io import BytesIO

from PIL import Image

from cogvx_fast.pictures import PictureError, fitted, read_picture

from .references import BadReferenceError

FORMATS = ("PNG", "JPEG", "WEBP")
_DECODING = threading.Lock()  # a large one takes some 500 MB on its way: one at a time

# What files begin with, or have at their fourth byte.
_PICTURES = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG"}
_OTHERS = {b"GIF8": "a GIF", b"BM": "a BMP picture", b"II*\0": "a TIFF picture", b"MM\0*": "a TIFF picture"}
_OTHERS |= {b"\x1aE\xdf\xa3": "a WebM or Matroska video"}
_BRANDS = {b"avif": "an AVIF picture", b"heic": "a HEIC picture", b"heix": "a HEIC picture", b"mif1": "a HEIF picture"}


def format_of(data: bytes) -> str | None:
    """Which of `FORMATS` the bytes say that they are; None: no picture that is taken."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return next((name for magic, name in _PICTURES.items() if data.startswith(magic)), None)


def words_for(data: bytes) -> str:
    """What somebody sent, for a message: "a PNG picture", "an MP4 video", …"""
    known = format_of(data)
    if known is not None:
        return f"a {known} picture"
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], "an MP4 video")
    return next((words for magic, words in _OTHERS.items() if data.startswith(magic)), "something else")


def as_png(data: bytes, width: int, height: int) -> bytes:
    """A picture as the PNG, RGB, of a first frame of so many pixels.

    It is turned as its EXIF data say, laid on white where it is transparent, scaled, and cut in the middle. Of an
    animation it is the first frame. Colour profiles are not applied.

    Raises:
        BadReferenceError: for what is no such picture, is broken, or has more than `cogvx_fast.pictures.MAX_PIXELS`.
    """
    out = BytesIO()
    with _DECODING:
        fitted(_decoded(data), width, height).save(out, "PNG")
    return out.getvalue()


def _decoded(data: bytes) -> Image.Image:
    try:
        return read_picture(data, FORMATS)
    except PictureError as error:
        raise BadReferenceError(str(error)) from error
