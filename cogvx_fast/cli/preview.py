"""`--preview FILE`: a picture of the video that is being made, small and rough, renewed while it is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .console import messages, say

if TYPE_CHECKING:
    import torch

PERIOD = 1.0  # seconds between two pictures, at least
ZOOM = 4  # times that a picture is enlarged: a pixel of it stands for 8 of the video
FRAMES = 4  # of the video, that a frame of it stands for


class PreviewFile:
    """The file, which is whole whenever it is there; a picture that cannot be written is the last one tried."""

    def __init__(self, path: Path, fps: int, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            path: .gif or .webp for a loop, .png for the frame in the middle.
            fps: of the video.
        """
        self._path, self._fps, self._clock = path, max(1, fps // FRAMES), clock
        self._due: float | None = clock()

    @contextlib.contextmanager
    def there(self) -> Iterator[None]:
        """Within the block it may be there; afterwards it is not."""
        try:
            yield
        finally:
            self._path.unlink(missing_ok=True)

    def show(self, pictures: torch.Tensor) -> None:
        """Write the first of `pictures`, uint8 `(batch, frames, height, width, 3)`, unless the last is too recent."""
        if self._due is None or self._clock() < self._due:
            return
        from PIL import Image

        from cogvx_fast.files import complete_or_absent
        from cogvx_fast.video import write_video

        frames = [Image.fromarray(frame) for frame in pictures[0].cpu().numpy()]
        size = frames[0].width * ZOOM, frames[0].height * ZOOM
        frames = [frame.resize(size, Image.Resampling.NEAREST) for frame in frames]
        try:
            if self._path.suffix.lower() == ".png":
                with complete_or_absent(self._path) as temporary:
                    frames[len(frames) // 2].save(temporary, format="PNG")
            else:
                write_video(frames, self._path, self._fps)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            say(messages, f"warning: {self._path} could not be written: {reason}; no more previews", style="yellow")
            self._due = None
            return
        self._due = self._clock() + PERIOD


class Unseen:
    """Nobody: of several processes the first shows the pictures that all of them make."""

    @contextlib.contextmanager
    def there(self) -> Iterator[None]:
        yield

    def show(self, pictures: torch.Tensor) -> None:
        pass
