"""The pictures and videos that a video is made of: found and read before the model is, and brought to its size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvx_fast.family import Variant

from .console import UsageError
from .tasks import Task

if TYPE_CHECKING:
    from PIL import Image

    from cogvx_fast.pictures import Fit

VIDEOS = ("--video", "--control-video")


@dataclass(frozen=True)
class Inputs:
    """What was read.

    Attributes:
        pictures: by the argument's name; of a video all its frames, as many as may be wanted.
    """

    pictures: Mapping[str, list[Image.Image]]

    @property
    def length(self) -> int | None:
        """Frames of the video; None: there is none."""
        return next((len(found) for name, found in self.pictures.items() if name in VIDEOS), None)

    @property
    def shape(self) -> tuple[int, int] | None:
        """Height and width of the first picture; None: there is none."""
        first = next((found[0] for found in self.pictures.values()), None)
        return None if first is None else (first.height, first.width)


def read(given: Mapping[str, Path | None], most: int) -> Inputs:
    """Read what is given.

    Args:
        given: files by the name of their argument.
        most: frames of a video.

    Raises:
        UsageError: for what is not there, or no picture or video.
    """
    from cogvx_fast.pictures import PictureError, read_picture, read_video

    found = {}
    for name, path in given.items():
        if path is None:
            continue
        try:
            found[name] = read_video(path, most) if name in VIDEOS else [read_picture(path)]
        except PictureError as error:
            raise UsageError(name, repr(str(path)), str(error)) from None
        except OSError as error:
            raise UsageError(name, repr(str(path)), f"cannot be read ({error.strerror})") from None
    return Inputs(found)


def size_like(shape: tuple[int, int], variant: Variant) -> tuple[int, int]:
    """Height and width in pixels of about as many as the checkpoint's own, of the shape of a picture, that it makes."""
    height, width = variant.default_size
    period, area = variant.pixels_per_token, height * width
    limits = variant.largest_size or (1 << 16, 1 << 16)
    ratio = shape[0] / shape[1]
    sides = (area * ratio) ** 0.5, (area / ratio) ** 0.5
    rounded = [max(period, round(side / period) * period) for side in sides]
    found = [min(side, limit // period * period) for side, limit in zip(rounded, limits, strict=True)]
    return found[0], found[1]


def makes_any_size(variant: Variant) -> bool:
    """Whether a checkpoint was trained on many sizes: CogVideoX 1.5 and Fun's first and last frames."""
    return variant.patch_size_t is not None or variant.in_channels > 2 * variant.out_channels


def arguments(inputs: Inputs, task: Task, height: int, width: int, num_frames: int, fit: Fit) -> dict[str, Any]:
    """What the pipeline is given, by its own names."""
    from cogvx_fast.pictures import fitted

    made: dict[str, Any] = {}
    for name, pictures in inputs.pictures.items():
        frames = [fitted(picture, width, height, fit) for picture in pictures[:num_frames]]
        made[task.takes[name]] = frames if name in VIDEOS else frames[0]
    return made


def note(inputs: Inputs, height: int, width: int, num_frames: int, fit: Fit, given: Mapping[str, Path | None]) -> str:
    """What becomes of pictures and videos of another size or length, in a line; empty where nothing does."""
    words = {"crop": "cut to", "pad": "padded to", "stretch": "stretched to"}[fit]
    parts = []
    for name, pictures in inputs.pictures.items():
        first, path = pictures[0], given[name]
        if (first.width, first.height) != (width, height):
            same = abs(first.width / first.height - width / height) < 1e-3
            becomes = "scaled to" if same else words
            parts.append(f"{path}: {first.width}x{first.height} is {becomes} {width}x{height}")
        if name in VIDEOS and len(pictures) > num_frames:
            parts.append(f"{path}: its first {num_frames} frames are used")
    return "; ".join(parts)
