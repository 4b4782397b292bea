"""Writes videos (MP4, GIF, animated WebP, a folder of PNG frames) and contact sheets: whole, or not at all.

A *video* here is any of
  - a sequence of PIL images of one size,
  - an array `[num_frames, height, width, 3]`, uint8 or floats in [0, 1] (diffusers' `output_type="np"`),
  - a torch tensor `[num_frames, 3, height, width]`, uint8 or floats in [0, 1] (diffusers' `output_type="pt"`),
  - an iterator of PIL images of one size, which are taken when they are to be written.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from . import metadata
from .files import complete_or_absent, try_place

if TYPE_CHECKING:
    import torch

Video: TypeAlias = "Sequence[Image.Image] | np.ndarray | torch.Tensor"
_Frames: TypeAlias = Iterable[Image.Image]

# Browsers slow these down to 10 frames a second when a frame is to be shown for less than 20 ms.
_ANIMATIONS = (".gif", ".webp")


def check_output(path: str | Path, fps: int | None = None) -> None:
    """Raise unless `write_video(video, path, fps)` can be expected to work; for use before the video is computed.

    The place is tried with a file that is empty; nothing is left on the disk.

    Raises:
        ValueError: names the path (or the rate) and what is allowed: the suffix is unknown, something is in the way,
            the folder cannot be written or made, this installation lacks the encoder, or the rate does not fit.
    """
    path = Path(path)
    check_name(path)
    suffix = path.suffix.lower()
    if suffix not in _WRITERS:
        raise ValueError(
            f"{str(path)!r}: unknown suffix {path.suffix!r}; allowed are .mp4, .gif and .webp, "
            "or a path without suffix for a folder of PNG frames"
        )
    if fps is not None and not 1 <= fps <= max_fps(path):
        raise ValueError(f"{fps} frames per second: must be 1 to {max_fps(path)} for {str(path)!r}")
    if suffix == ".mp4":
        _check_h264(path)
    if suffix == ".webp" and not features.check("webp"):
        raise ValueError(f"{str(path)!r}: this build of Pillow cannot write WebP; use .mp4, .gif or a folder")
    _check_place(path, is_folder=not suffix)


def check_name(path: str | Path) -> None:
    """Raise a ValueError for a path that ends in no name: an empty one, `.`, `..`, `/`, or a suffix alone."""
    name = Path(path).name
    if name in ("", "..") or name.lower() in _WRITERS or name.lower() == ".png":
        raise ValueError(f"{str(path)!r}: ends in no name; name a file, or a new folder for PNG frames")


def max_fps(path: str | Path) -> int:
    """The most frames a second that a video of this suffix can have."""
    return 50 if Path(path).suffix.lower() in _ANIMATIONS else 120


def holds_all_frames(path: str | Path) -> bool:
    """Whether the writer of this suffix needs all frames before it writes the first."""
    return Path(path).suffix.lower() in _ANIMATIONS


def check_sheet(path: str | Path) -> None:
    """Raise unless `contact_sheet(..., path)` can be expected to write there.

    Raises:
        ValueError: as in `check_output`; the only suffix allowed is .png.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{str(path)!r}: unknown suffix {path.suffix!r}; a contact sheet is a .png")
    _check_place(path, is_folder=False)


def write_video(
    video: Video | Iterator[Image.Image],
    path: str | Path,
    fps: int = 8,
    repeatable: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write `video` to `path` in the format of its suffix and return the path; missing parent folders are made.

    Frames of an iterator are written as they come to `.mp4` and to a folder; the writers of `.gif` and `.webp` need
    all of them first.

    - `.mp4`: H.264, 4:2:0, BT.709, index in front, for browsers and phones; odd sizes gain a row or column.
    - `.gif`, `.webp`: endless loops. Their writers merge equal consecutive frames into one that is shown longer.
    - no suffix: a folder `frame-0001.png`, `frame-0002.png`, …; it may exist if it is empty.

    The file appears under its name when it is complete. On any exception, Ctrl-C and a full disk included,
    nothing is left behind and a file that was there before stays as it was.

    Args:
        fps: frames per second, 1 to 120; at most 50 for `.gif` and `.webp`; without effect on a folder.
        repeatable: whether the same frames must be the same bytes each time, which a `.mp4` else is not always: it
            becomes up to twice as large.
        settings: kept inside of the file, see `metadata`; of a folder in its first frame.

    Raises:
        ValueError: if `video` is none, or for what `check_output` refuses.
        OSError: if the file cannot be written.
    """
    path = Path(path)
    images = _of_one_size(video) if isinstance(video, Iterator) else as_images(video)
    check_output(path, fps)
    with complete_or_absent(path) as temporary:
        suffix = path.suffix.lower()
        options = {"repeatable": True} if repeatable and suffix == ".mp4" else {}
        _WRITERS[suffix](images, temporary, fps, settings, **options)
    return path


def contact_sheet(
    videos: Sequence[Video], captions: Sequence[str], path: str | Path, columns: int = 8, cell: int = 192
) -> Path:
    """Write one PNG with a row for each video: its caption, and under it up to `columns` frames at equal distances.

    Small frames are enlarged by the greatest whole number that keeps them within `cell` pixels, large ones
    are reduced to it. Written whole or not at all, as in `write_video`.

    Raises:
        ValueError: if there is no video, a caption is missing, or for what `check_sheet` refuses.
        OSError: if the file cannot be written.
    """
    path = Path(path)
    if not videos or len(videos) != len(captions):
        raise ValueError(f"{len(videos)} videos with {len(captions)} captions; one each, and at least one, are needed")
    check_sheet(path)
    rows = [_sheet_row(as_images(video), columns, cell) for video in videos]
    font = ImageFont.load_default(size=18)
    margin, line = 12, 26
    width = max(sum(image.width + margin for image in row) for row in rows) + margin
    texts = [_wrapped(caption, font, width - 2 * margin) for caption in captions]
    height = margin + sum(len(text) * line + row[0].height + 2 * margin for text, row in zip(texts, rows, strict=True))
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    y = margin
    for text, row in zip(texts, rows, strict=True):
        for words in text:
            draw.text((margin, y), words, fill="black", font=font)
            y += line
        x = margin
        for image in row:
            sheet.paste(image, (x, y))
            x += image.width + margin
        y += row[0].height + 2 * margin
    with complete_or_absent(path) as temporary:
        sheet.save(temporary, format="PNG")
    return path


def as_images(video: Video) -> list[Image.Image]:
    """The frames of `video` as RGB images.

    Raises:
        ValueError: if it is empty, of another layout, not finite, or its frames differ in size.
    """
    if hasattr(video, "detach"):  # a tensor, recognised without importing torch
        video = video.detach().cpu()
        video = (video.float() if video.is_floating_point() else video).numpy()
        if video.ndim == 4:
            video = video.transpose(0, 2, 3, 1)
    if isinstance(video, np.ndarray):
        video = [Image.fromarray(frame) for frame in _as_uint8(video)]
    images = [image.convert("RGB") for image in video]
    if not images:
        raise ValueError("the video has no frames")
    if len({image.size for image in images}) > 1:
        raise ValueError(f"the frames differ in size: {sorted({image.size for image in images})}")
    return images


def _of_one_size(frames: Iterator[Image.Image]) -> Iterator[Image.Image]:
    """The frames as RGB images; raises as `as_images` does, when it comes to it."""
    size = None
    for frame in frames:
        if size is not None and frame.size != size:
            raise ValueError(f"the frames differ in size: {sorted({size, frame.size})}")
        size = frame.size
        yield frame.convert("RGB")
    if size is None:
        raise ValueError("the video has no frames")


def _as_uint8(array: np.ndarray) -> np.ndarray:
    if array.ndim != 4 or array.shape[-1] != 3:
        raise ValueError(
            f"a video of shape {array.shape}: arrays must be [num_frames, height, width, 3], "
            "tensors [num_frames, 3, height, width]"
        )
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"a video of dtype {array.dtype}: must be uint8 or floating point in [0, 1]")
    if not np.isfinite(array).all():
        raise ValueError("the video has values that are not finite")
    return (array.clip(0, 1) * 255).round().astype(np.uint8)


def why_no_h264() -> tuple[str, str] | None:
    """What keeps MP4 files from being written here, and what to do about it; None where they can be."""
    try:
        import av
    except ImportError as error:  # not installed, or without a library that it needs
        return f"PyAV cannot be imported ({error})", "pip install av"
    try:
        av.codec.Codec("libx264", "w")
    except av.codec.codec.UnknownCodecError:
        return "this build of PyAV has no libx264", "pip install --force-reinstall av"
    return None


def _check_h264(path: Path) -> None:
    problem = why_no_h264()
    if problem is not None:
        reason, remedy = problem
        raise ValueError(
            f"{str(path)!r}: {reason}; use .webp, .gif or a folder, or install PyAV's own wheel ({remedy})"
        )


def _check_place(path: Path, is_folder: bool) -> None:
    try:
        if is_folder and path.name in ("", ".."):
            raise ValueError(f"{str(path)!r}: names no folder; frames go to a new or empty folder")
        if is_folder and path.is_symlink():
            raise ValueError(
                f"{str(path)!r}: is a link to {os.readlink(path)!r}; frames go to a new or empty folder: name that"
            )
        if is_folder and path.exists() and not path.is_dir():
            raise ValueError(
                f"{str(path)!r}: is a file; a folder of frames needs a name that is free or an empty folder"
            )
        if is_folder and path.is_dir() and any(path.iterdir()):
            raise ValueError(f"{str(path)!r}: is a folder with something in it; frames go to a new or empty folder")
        if not is_folder and path.is_dir():
            raise ValueError(f"{str(path)!r}: is a folder; name a file, or a path without suffix for PNG frames")
        existing = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
        if not existing.is_dir():
            raise ValueError(f"{str(path)!r}: {str(existing)!r} is not a folder")
        try_place(path, is_folder)
    except OSError as error:
        raise ValueError(f"{str(path)!r}: cannot be written ({error.strerror}); choose a writable folder") from error


def _write_mp4(
    images: _Frames, path: Path, fps: int, settings: Mapping[str, Any] | None, repeatable: bool = False
) -> None:
    import av
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

    images = iter(images)
    first = next(images)
    # 4:2:0 shares one chroma sample among 2 x 2 pixels, so both sides must be even.
    pad = ((0, first.height % 2), (0, first.width % 2), (0, 0))
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        if settings is not None:
            container.metadata["comment"] = metadata.as_text(settings)
        # The assembly of x264's mbtree reads what nobody wrote where a row has other than a multiple of 8 macroblocks.
        options = {"crf": "16", "preset": "medium"} | ({"x264-params": "mbtree=0"} if repeatable else {})
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height = first.width + pad[1][1], first.height + pad[0][1]
        stream.pix_fmt = "yuv420p"
        # Untagged streams are read as BT.601 or BT.709 depending on their size and the player.
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_primaries = ColorPrimaries.BT709
        stream.codec_context.color_trc = ColorTrc.BT709
        stream.codec_context.color_range = ColorRange.MPEG
        for index, image in enumerate(itertools.chain([first], images)):
            frame = av.VideoFrame.from_ndarray(np.pad(np.asarray(image), pad, mode="edge"), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _write_gif(images: _Frames, path: Path, fps: int, settings: Mapping[str, Any] | None) -> None:
    images, kept = list(images), {} if settings is None else metadata.options(".gif", settings)
    _write_animation(images, path, _durations(len(images), fps, unit_ms=10), format="GIF", **kept)


def _write_webp(images: _Frames, path: Path, fps: int, settings: Mapping[str, Any] | None) -> None:
    images, kept = list(images), {} if settings is None else metadata.options(".webp", settings)
    _write_animation(images, path, _durations(len(images), fps, unit_ms=1), format="WEBP", quality=90, **kept)


def _write_animation(images: list[Image.Image], path: Path, durations: list[int], **options: Any) -> None:
    first, *rest = images
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0, **options)


def _write_frames(images: _Frames, path: Path, fps: int, settings: Mapping[str, Any] | None) -> None:
    path.mkdir()
    kept = {} if settings is None else metadata.options(".png", settings)
    for number, image in enumerate(images, start=1):
        image.save(path / f"frame-{number:04d}.png", **(kept if number == 1 else {}))


def _durations(num_frames: int, fps: int, unit_ms: int) -> list[int]:
    """Milliseconds for each frame in whole units, rounded so that no frame starts half a unit early or late."""
    starts = [round(index * 1000 / fps / unit_ms) * unit_ms for index in range(num_frames + 1)]
    return [end - start for start, end in itertools.pairwise(starts)]


def _sheet_row(images: list[Image.Image], columns: int, cell: int) -> list[Image.Image]:
    chosen = np.linspace(0, len(images) - 1, min(columns, len(images))).round().astype(int)
    width, height = images[0].size
    longest = max(width, height)
    if longest <= cell:
        size = (width * (cell // longest), height * (cell // longest))
        return [images[index].resize(size, Image.Resampling.BICUBIC) for index in chosen]
    size = (max(1, round(width * cell / longest)), max(1, round(height * cell / longest)))
    return [images[index].resize(size, Image.Resampling.LANCZOS) for index in chosen]


def _wrapped(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, num_lines: int = 3
) -> list[str]:
    """`text` in lines of at most `width` pixels; what does not fit into `num_lines` becomes an ellipsis."""
    lines, words = [""], text.split()
    for position, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        elif len(lines) < num_lines:
            lines.append(word)
        else:
            lines[-1] += " …" if position < len(words) else ""
            break
    return lines


_WRITERS: dict[str, Callable[..., None]] = {
    ".mp4": _write_mp4,
    ".gif": _write_gif,
    ".webp": _write_webp,
    "": _write_frames,
}
