"""The forms in which a video can be fetched. All but the video itself are made of it when they are first asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cogvx_fast.video import write_video

from . import references
from .files import VIDEO, Files
from .jobs import Job
from .store import Store

_THUMBNAIL = 512  # pixels, of the longer side at most
_SHEET_CELLS, _SHEET_COLUMNS, _SHEET_SIDE = 12, 4, 256
_MAKING = threading.Lock()  # decoding all frames takes memory: one at a time


@dataclass(frozen=True)
class Variant:
    """`name` of the file; `write` makes it of frames, at a path, for frames a second."""

    name: str
    media_type: str
    write: Callable[[list[Image.Image], Path, int], Any] | None


def _thumbnail(frames: list[Image.Image], path: Path, fps: int) -> None:
    image = frames[len(frames) // 2]
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    image.save(path, quality=85)


def _spritesheet(frames: list[Image.Image], path: Path, fps: int) -> None:
    """Frames at equal distances, four to a row."""
    chosen = np.linspace(0, len(frames) - 1, min(_SHEET_CELLS, len(frames))).round().astype(int)
    cells = [frames[index].copy() for index in chosen]
    for cell in cells:
        cell.thumbnail((_SHEET_SIDE, _SHEET_SIDE))
    width, height = cells[0].size
    sheet = Image.new("RGB", (width * _SHEET_COLUMNS, height * -(-len(cells) // _SHEET_COLUMNS)))
    for number, cell in enumerate(cells):
        sheet.paste(cell, (number % _SHEET_COLUMNS * width, number // _SHEET_COLUMNS * height))
    sheet.save(path, quality=85)


VARIANTS = {
    "video": Variant(VIDEO, "video/mp4", None),
    "gif": Variant("video.gif", "image/gif", write_video),
    "webp": Variant("video.webp", "image/webp", write_video),
    "thumbnail": Variant("thumbnail.webp", "image/webp", _thumbnail),
    "spritesheet": Variant("spritesheet.jpg", "image/jpeg", _spritesheet),
}


def size_of(store: Store, files: Files, job: Job, variant: Variant) -> int | None:
    """Bytes of a variant of a completed job, which is made if it is not there; None: its video is gone."""
    size = files.size(job.id, variant.name)
    if size is not None or variant.write is None:
        return size
    write = variant.write
    with _MAKING:
        size = files.size(job.id, variant.name)
        if size is not None:
            return size
        try:
            with files.local(job.id, VIDEO) as path:
                frames = references.frames(path, most=job.request["num_frames"])
        except FileNotFoundError:
            return None
        size = files.write(job.id, variant.name, lambda path: write(frames, path, job.request["fps"]))
        store.set_bytes(job.id, files.sizes(job.id))
        return size
