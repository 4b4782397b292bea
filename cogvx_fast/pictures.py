"""Pictures and videos that a video is made of: read as people have them, and brought to a size."""

from __future__ import annotations

import enum
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, ImageSequence

MAX_PIXELS = 50_000_000  # of a picture, or a frame: those of large cameras
_ANIMATIONS = (".gif", ".webp")


class Fit(enum.StrEnum):
    """How a picture of another shape becomes one of a size."""

    crop = "crop"  # scaled until it covers the size, and cut in the middle
    pad = "pad"  # scaled until the size covers it, with black around
    stretch = "stretch"


class PictureError(ValueError):
    """What is there is no picture or video that can be used; says why, without its name."""


def read_picture(source: Path | bytes, formats: tuple[str, ...] | None = None) -> Image.Image:
    """A picture as RGB: turned as its EXIF data say, on white where it is transparent; of an animation the first.

    CMYK and 16 bits are converted; colour profiles are not applied.

    Args:
        formats: Pillow's names of those that may be; None: all that Pillow knows.

    Raises:
        PictureError: for what is none, is broken, or has more than `MAX_PIXELS`.
    """
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:  # as its head says, before anything is decoded
                raise PictureError(f"has {image.width}x{image.height} pixels; must be at most {MAX_PIXELS}")
            return _on_white(ImageOps.exif_transpose(_of_eight_bits(image)))
    except (PictureError, FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Image.DecompressionBombError:
        raise PictureError(f"has too many pixels; must be at most {MAX_PIXELS}") from None
    except Exception as error:  # whatever a decoder dies of is wrong with what it was given
        raise PictureError("cannot be decoded; must be a picture such as PNG, JPEG or WebP") from error


def read_video(path: Path, most: int) -> list[Image.Image]:
    """The first frames of a video as RGB images: of a file that FFmpeg or Pillow reads, or a folder of pictures.

    Args:
        most: so many at most.

    Raises:
        PictureError: for what is none, is broken, or has frames of more than `MAX_PIXELS`.
        OSError: for what cannot be opened.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
        if not files:
            raise PictureError("has no pictures in it: PNG, JPEG or WebP")
        return [read_picture(file) for file in files[:most]]
    if path.suffix.lower() in _ANIMATIONS:
        return _animation(path, most)
    import av

    found: list[Image.Image] = []
    try:
        with av.open(str(path), "r") as container:
            for frame in container.decode(video=0):
                if frame.width * frame.height > MAX_PIXELS:
                    raise PictureError(f"has {frame.width}x{frame.height} pixels; must be at most {MAX_PIXELS}")
                found.append(frame.to_image())
                if len(found) == most:
                    break
    except (FileNotFoundError, PermissionError):
        raise
    except (av.FFmpegError, IndexError, MemoryError, ValueError) as error:
        if isinstance(error, PictureError):
            raise
        raise PictureError(
            "cannot be decoded; must be a video such as MP4, GIF or WebP, or a folder of pictures"
        ) from error
    if not found:
        raise PictureError("has no frames")
    return found


def _animation(path: Path, most: int) -> list[Image.Image]:
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise PictureError(f"has {image.width}x{image.height} pixels; must be at most {MAX_PIXELS}")
            frames = ImageSequence.Iterator(image)
            return [_on_white(frame) for _, frame in zip(range(most), frames, strict=False)]
    except (PictureError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        raise PictureError("cannot be decoded; must be an animation") from error


def fitted(image: Image.Image, width: int, height: int, how: Fit = Fit.crop) -> Image.Image:
    """An image of so many pixels."""
    if how is Fit.stretch:
        return image.resize((width, height), Image.Resampling.LANCZOS)
    choose = max if how is Fit.crop else min
    scale = choose(width / image.width, height / image.height)
    scaled = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    resized = image.resize(scaled, Image.Resampling.LANCZOS)
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    if how is Fit.crop:
        return resized.crop((left, top, left + width, top + height))
    canvas = Image.new("RGB", (width, height))
    canvas.paste(resized, (-left, -top))
    return canvas


def _of_eight_bits(image: Image.Image) -> Image.Image:
    """Pillow cuts values above 255 off, where the upper eight of 16 bits are meant."""
    if not image.mode.startswith("I"):
        image.load()
        return image
    values = np.asarray(image).astype(np.uint32) >> 8
    grey = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    grey.info = {"exif": image.info["exif"]} if "exif" in image.info else {}
    return grey


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    picture = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
