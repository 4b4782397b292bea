"""The settings that a video was made with, inside of its file: as JSON where each format keeps a comment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

KEY = "cogvx_fast"  # that the settings of ours have, and no others
_DESCRIPTION = 0x010E  # of EXIF: ImageDescription


def settings_of(asked: Mapping[str, Any], prompt: str, seed: int, versions: Mapping[str, str]) -> dict[str, Any]:
    """What a video keeps of how it was made: `asked`, its prompt and seed, and by which versions."""
    from . import __version__

    return {KEY: __version__, **versions, "prompt": prompt, "seed": str(seed), **asked}


def as_text(settings: Mapping[str, Any]) -> str:
    """Settings as ASCII, which every format keeps."""
    return json.dumps(dict(settings), ensure_ascii=True, separators=(",", ":"))


def options(suffix: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What Pillow is given beside a picture, so that it keeps them.

    Args:
        suffix: ".gif", ".webp" or ".png".
    """
    text = as_text(settings)
    if suffix == ".gif":
        return {"comment": text.encode()}
    if suffix == ".png":
        info = PngInfo()
        info.add_text("Comment", text)
        return {"pnginfo": info}
    exif = Image.Exif()
    exif[_DESCRIPTION] = text
    return {"exif": exif.tobytes()}


def read(path: str | Path) -> dict[str, Any]:
    """The settings in a video that `write_video` wrote with some: a file, or the folder of its frames.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it holds none.
    """
    path = Path(path)
    try:
        found = json.loads(_comment(path))
    except OSError:
        raise
    except Exception as error:  # whatever a decoder dies of
        raise ValueError(f"{str(path)!r} holds no settings of cogvx_fast") from error
    if not isinstance(found, dict) or KEY not in found:
        raise ValueError(f"{str(path)!r} holds no settings of cogvx_fast")
    return found


def _comment(path: Path) -> str | bytes:
    if path.is_dir():
        path = min(path.glob("*.png"), default=path / "frame-0001.png")
    if path.suffix.lower() in (".gif", ".png", ".webp"):
        with Image.open(path) as image:
            if path.suffix.lower() == ".gif":
                return image.info["comment"]
            return image.info["Comment"] if path.suffix.lower() == ".png" else image.getexif()[_DESCRIPTION]
    import av

    path.stat()  # an OSError where there is none
    with av.open(str(path)) as container:
        return container.metadata["comment"]
