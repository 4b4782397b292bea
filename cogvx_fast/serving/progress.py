"""One video on its way: what is told, shown, saved and written between the parts of the pipeline."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cogvx_fast.resume import Parked, ResumableGeneration, Step
from cogvx_fast.video import write_video

from . import references
from .files import PARKED, PREVIEW, REFERENCE, VIDEO, Files
from .jobs import Job, StorageFullError
from .logs import logger
from .orders import Order
from .settings import Settings

_PREVIEW_SIDE = 128  # pixels, of the shorter side at least
_PREVIEW_PART = 0.01  # of the time that may go into previews


class ParkedError(Exception):
    """The job is saved and can be gone on with. `so_far`: its result up to here."""

    def __init__(self, so_far: Mapping[str, Any]) -> None:
        super().__init__()
        self.so_far = so_far


class CancelledError(Exception):
    """Nobody wants the job any more."""


class Lost(Exception):  # noqa: N818 - no error: the job is another's
    """The job is another worker's, or gone."""


class Progress:
    """One video on its way: what is done between the parts of the pipeline."""

    def __init__(
        self,
        settings: Settings,
        job: Job,
        files: Files,
        after_step: Callable[[int], bool],
        between: Callable[[], bool],
        preview: Any,
    ) -> None:
        self.order = Order(**job.request)
        self._settings, self._job, self._files = settings, job, files
        self._tell, self._between, self._preview = after_step, between, preview
        self._seconds: dict[str, float] = dict(job.result.get("stage_seconds", {}))
        self._steps: int = job.result.get("made_steps", 0)
        self._last: Parked | None = None
        self._step_before: torch.cuda.Event | None = None
        self._saved_at = time.monotonic()
        self._next_picture_at = self._saved_at + settings.preview_seconds

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def so_far(self) -> dict[str, Any]:
        return {"stage_seconds": dict(self._seconds), "made_steps": self._steps}

    def parked(self) -> Parked | None:
        """Where to go on; None: at the start."""
        try:
            with self._files.local(self._job.id, PARKED) as path:
                parked = Parked.load(path)
        except FileNotFoundError:
            return None
        except ValueError:  # of another version
            logger.exception("begins anew", extra={"job": self._job.id})
            return None
        if parked.done == parked.total:
            self._last = parked
        return parked

    def reference(self) -> list[Image.Image]:
        order = self.order
        with self._files.local(self._job.id, REFERENCE) as path:
            return references.frames(path, order.width, order.height, order.num_frames)

    def picture(self) -> Image.Image:
        with self._files.local(self._job.id, REFERENCE) as path, Image.open(path, formats=("PNG",)) as image:
            image.load()
            return image

    def after_step(self, step: Step, generation: ResumableGeneration) -> bool:
        self._steps += 1
        self._keep_pace(step.latents.device)
        parks = self._tell(step.done)
        now = time.monotonic()
        if step.done == step.total:
            self._last = generation.take()  # for the time until the file is there
        elif not parks and now - self._saved_at >= self._settings.checkpoint_seconds:
            self._save(generation.take())
        if self._preview is not None and now >= self._next_picture_at:
            self._show(step.prediction)
        return parks

    def _keep_pace(self, device: torch.device) -> None:
        """A GPU is told what to do long before it does it: here no more than a step, so that a job that is parked or
        cancelled leaves it at once, and what is said of a step is of one that was made."""
        if device.type != "cuda":
            return
        event = torch.cuda.current_stream(device).record_event()
        if self._step_before is not None:
            self._step_before.synchronize()
        self._step_before = event

    def _save(self, parked: Parked | None) -> None:
        assert parked is not None
        try:
            self._files.write(self._job.id, PARKED, parked.save)
        except StorageFullError:  # what was saved before, or the start, is where it would go on
            logger.exception("not saved", extra={"job": self._job.id})
        self._saved_at = time.monotonic()

    def parks(self, parked: Parked | None) -> ParkedError:
        """Save it; what is raised then."""
        self._save(parked)
        return ParkedError(self.so_far())

    def _show(self, prediction: torch.Tensor) -> None:
        started = time.monotonic()
        picture = self._preview.frames(prediction[:1])[0].cpu().numpy()
        images = [Image.fromarray(frame) for frame in picture]
        zoom = max(1, math.ceil(_PREVIEW_SIDE / min(images[0].size)))
        images = [image.resize((image.width * zoom, image.height * zoom)) for image in images]
        first, *rest = images
        with contextlib.suppress(StorageFullError):
            self._files.write(
                self._job.id,
                PREVIEW,
                lambda path: first.save(path, save_all=True, append_images=rest, duration=250, loop=0),
            )
        now = time.monotonic()
        # So late that no more than a hundredth of the time goes into them.
        self._next_picture_at = max(started + self._settings.preview_seconds, now + (now - started) / _PREVIEW_PART)

    def write(self, pieces: Iterator[torch.Tensor], processor: Any) -> int:
        """Write frames as they are decoded; the size of the file in bytes."""
        before = self._seconds.get("decode", 0.0)
        started = time.perf_counter()
        try:
            return self._files.write(self._job.id, VIDEO, lambda path: self._write(pieces, processor, path))
        except StorageFullError:
            if self._last is not None:
                self._save(self._last)
            raise
        finally:
            decoding = self._seconds.get("decode", 0.0) - before
            self._seconds["write"] = self._seconds.get("write", 0.0) + time.perf_counter() - started - decoding

    def _write(self, pieces: Iterator[torch.Tensor], processor: Any, path: Path) -> None:
        write_video(self._frames(pieces, processor), path, self.order.fps, repeatable=True)
        self._between()  # it gets its name only under a lease: another's video is not written over

    def _frames(self, pieces: Iterator[torch.Tensor], processor: Any) -> Iterator[Image.Image]:
        while True:
            with self.stage("decode"):
                pixels = next(pieces, None)
            if pixels is None:
                return
            if self._between():
                raise self.parks(self._last)
            yield from processor.postprocess_video(pixels, output_type="pil")[0]
