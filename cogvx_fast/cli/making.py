"""Carries out an order for videos: loads the model, denoises, decodes and writes, and says what was made."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.text import Text

from cogvx_fast.family import decoded_frames, latent_frames

from . import enhancing, lora, tasks, together
from .console import OutputError, messages, results, say
from .job import Job
from .preview import PreviewFile, Unseen
from .terminal_preview import TerminalPreview

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from rich.progress import Progress, TaskID

    from cogvx_fast import FastCogVideoXPipeline


T = TypeVar("T")


@dataclass
class Stages:
    """Seconds spent in each stage, summed over all videos."""

    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("load", "text", "denoise", "decode", "write"), 0.0)
    )

    def timed(self, stage: str, work: Callable[[], T]) -> T:
        """The result of `work()`; its duration counts for `stage`."""
        start = time.perf_counter()
        result = work()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
        return result

    def add(self, seconds: dict[str, float]) -> None:
        """Count what a pipeline says of the stages up to its latents."""
        for stage in ("text", "preview", "denoise"):
            if stage in seconds:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds[stage]


def run(job: Job) -> None:
    """Load the model, make every video of `job` and say what was made."""
    stages = Stages()
    job = _enhanced(job)
    pipe = stages.timed("load", lambda: _in_memory(job, lambda: _load(job)))
    videos = _make_videos(job, pipe, stages)
    if (sheet := job.sheet) is not None and together.company().is_first:
        from cogvx_fast.video import contact_sheet

        stages.timed(
            "write", lambda: _in_memory(job, lambda: _written(sheet, lambda: contact_sheet(videos, job.titles, sheet)))
        )
        say(results, f"wrote {sheet}: a contact sheet, {_size_on_disk(sheet)}")
    threads = next((line for line in pipe.engine_report().lines if line.name == "threads"), None)
    if threads is not None:
        say(messages, f"note: threads: {threads.detail}", style="yellow")
    steps = next((line for line in pipe.engine_report().lines if line.name == "steps"), None)
    if steps is not None:
        say(results, f"steps: {steps.detail}")
    shared = next((line for line in pipe.engine_report().lines if line.name == "parallel"), None)
    if shared is not None:
        say(results, shared.detail)
    times = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in stages.seconds.items())
    say(results, f"{job.device}, {job.dtype}, engine {pipe.engine_report().tier}, {job.steps} steps: {times}")


def _enhanced(job: Job) -> Job:
    """With its prompts rewritten; of several processes the first has asked for them."""
    made = enhancing.applied(job) if together.company().is_first else job
    prompts, originals = together.as_the_first((made.prompts, made.originals))
    return dataclasses.replace(made, prompts=prompts, originals=originals)


def _load(job: Job) -> FastCogVideoXPipeline:
    from . import loading

    with _announced_loading(job.checkpoint.source):
        from cogvx_fast import FastCogVideoXPipeline  # noqa: F401 - first, as it keeps the noise of imports away

        with loading.quiet_libraries():
            _warn_of_cut_prompts(job, loading.load_tokenizer(job.checkpoint))
            pipe = loading.load_pipeline(
                job.checkpoint,
                job.dtype,
                job.device,
                job.engine,
                job.scheduler,
                job.task.pipeline,
                job.offload,
                reads_text=together.company().is_first,
            )
            lora.load(pipe, job.loras)
            return pipe


def _announced_loading(source: str) -> contextlib.AbstractContextManager:
    if Path(source).is_dir():
        return messages.status(Text(f"loading {source}"))
    # A download shows bars of its own, which a spinner would tear.
    say(messages, f"loading {source}")
    return contextlib.nullcontext()


def _make_videos(job: Job, pipe: FastCogVideoXPipeline, stages: Stages) -> list[list[Image.Image]]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from cogvx_fast.video import write_video

    from . import loading

    videos, made = [], []
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    try:
        with (
            loading.quiet_libraries(),
            Progress(*columns, console=messages) as progress,
            _previews(job, pipe, progress, stages) as previews,
        ):
            for number, (prompt, title, path, seed) in enumerate(
                zip(job.prompts, job.titles, job.outputs, job.seeds, strict=True), start=1
            ):
                label = f"{number}/{len(job.prompts)} " if len(job.prompts) > 1 else ""
                task = progress.add_task(f"{label}text", total=job.made_steps)
                latents = _denoise(job, pipe, prompt, seed, progress, task, label, previews)
                stages.add(pipe.stage_seconds)
                progress.update(task, description=f"{label}decode", completed=0, total=job.num_frames)
                shown = Shown(keeps=job.sheet is not None)
                frames = shown.of(_frames(job, pipe, latents, stages, lambda: progress.advance(task)))  # noqa: B023
                before = stages.seconds["decode"]
                start = time.perf_counter()
                if not together.company().is_first:
                    _in_memory(job, lambda: deque(frames, maxlen=0))  # noqa: B023 - its bands, for the first
                    continue
                write = functools.partial(write_video, frames, path, job.fps, settings=_kept(job, number - 1))
                _in_memory(job, functools.partial(_written, path, write))
                decoding = stages.seconds["decode"] - before
                stages.seconds["write"] += time.perf_counter() - start - decoding
                progress.update(task, description=f"{label}done")
                rate = f" at {job.fps} fps" if path.suffix else ""
                what = f"{shown.number} frames of {shown.size[0]}x{shown.size[1]}{rate}"
                made.append(f"wrote {path}: {what}, {_size_on_disk(path)}, {title!r}{_and_seed(job, seed)}")
                if job.sheet is not None:
                    videos.append(shown.frames)
    finally:
        # Said when the bar is gone, and also when a later video failed.
        for line in made:
            say(results, line)
    return videos


@contextlib.contextmanager
def _previews(
    job: Job, pipe: FastCogVideoXPipeline, progress: Progress, stages: Stages
) -> Iterator[list[PreviewFile | TerminalPreview | Unseen]]:
    """Within the block who shows pictures of what is being made."""
    previews: list[PreviewFile | TerminalPreview | Unseen] = []
    if together.company().size > 1 and together.as_the_first(job.preview is not None or job.graphics is not None):
        from cogvx_fast.preview import fitted

        fitted(pipe)  # by each process for itself: what is decoded in a generation, all decode together
        if not together.company().is_first:
            yield [Unseen()]
            return
    if job.preview is not None:
        previews.append(PreviewFile(job.preview, job.fps))
    if job.graphics is not None:
        from cogvx_fast.preview import fitted

        try:
            stages.timed("preview", lambda: fitted(pipe))
            previews.append(TerminalPreview(job.graphics, progress))
        except ValueError as error:  # that of --preview is an error; what nobody may have asked for is no reason to end
            say(messages, f"note: no pictures in the terminal: {error}", style="yellow")
    with contextlib.ExitStack() as stack:
        for preview in previews:
            stack.enter_context(preview.there())
        yield previews


@dataclass
class Shown:
    """What went by on its way to the file: how many frames, of which size, and, if they are wanted later, they."""

    keeps: bool
    number: int = 0
    size: tuple[int, int] = (0, 0)
    frames: list[Image.Image] = field(default_factory=list)

    def of(self, frames: Iterator[Image.Image]) -> Iterator[Image.Image]:
        for frame in frames:
            self.number, self.size = self.number + 1, frame.size
            if self.keeps:
                self.frames.append(frame)
            yield frame


def _denoise(
    job: Job,
    pipe: Callable[..., Any],
    prompt: str,
    seed: int,
    progress: Progress,
    task: TaskID,
    label: str,
    previews: list[PreviewFile | TerminalPreview | Unseen],
) -> torch.Tensor:
    import torch

    def on_step_end(_pipe: Any, step: int, _timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        progress.update(task, completed=step + 1, description=f"{label}denoise")
        for preview in previews:
            preview.show(callback_kwargs["preview"])
        return callback_kwargs

    return _in_memory(
        job,
        lambda: (
            pipe(
                prompt=prompt,
                negative_prompt=job.negative,
                height=job.height,
                width=job.width,
                num_inference_steps=job.steps,
                guidance_scale=job.guidance,
                use_dynamic_cfg=job.dynamic_guidance,
                # Noise is drawn on the CPU: the same seed is the same video on every device.
                generator=torch.Generator("cpu").manual_seed(seed),
                callback_on_step_end=on_step_end,
                max_sequence_length=job.text_length,
                output_type="latent",
                **job.inputs,
                **({"preview": True} if previews else {}),
            ).frames
        ),
    )


def _frames(
    job: Job, pipe: FastCogVideoXPipeline, latents: torch.Tensor, stages: Stages, tick: Callable[[], None]
) -> Iterator[Image.Image]:
    """The frames as they are decoded; `tick` is called for each."""
    from PIL import Image

    # A checkpoint's own number need not be one that its autoencoder makes.
    num_frames = decoded_frames(latent_frames(job.num_frames))
    # Of an even number of latent frames it makes four frames of the first, which is one where nothing was padded.
    surplus = num_frames - job.num_frames if job.task is tasks.INPAINT else 0
    chunks = _in_memory(job, lambda: pipe.decode_stream(latents, num_frames))
    while True:
        pixels = stages.timed("decode", lambda: _in_memory(job, lambda: next(chunks, None)))
        if pixels is None:
            return
        pixels, surplus = pixels[:, :, surplus:], 0
        for frame in pipe.video_processor.postprocess_video(pixels, output_type="pil")[0]:
            tick()
            size = (frame.width * job.zoom, frame.height * job.zoom)
            yield frame if job.zoom == 1 else frame.resize(size, Image.Resampling.BICUBIC)


def _kept(job: Job, number: int) -> dict[str, Any] | None:
    """What the file of the video at `number` keeps of how it was made."""
    if job.settings is None:
        return None
    import diffusers
    import torch

    from cogvx_fast import metadata

    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    asked = job.settings | {"dtype": job.dtype}
    if job.originals[number] is not None:
        asked["original_prompt"] = job.originals[number]
    return metadata.settings_of(asked, job.prompts[number], job.seeds[number], versions)


def _and_seed(job: Job, seed: int) -> str:
    """Where several differ, or it was drawn, which one it is."""
    return f", seed {seed}" if len(set(job.seeds)) > 1 or job.says_seed else ""


def _in_memory(job: Job, work: Callable[[], T]) -> T:
    """`work()`, whose failure is that of this video: for want of memory, or of numbers that are finite."""
    from . import loading

    try:
        with loading.within_memory(job.device, job.num_frames, job.height, job.width):
            return work()
    except ValueError as error:
        raise OutputError(f"no video could be made: {' '.join(str(error).split())}") from error


def _warn_of_cut_prompts(job: Job, tokenizer: Any) -> None:
    from . import loading

    limit = job.text_length
    texts = [("the prompt", prompt) for prompt in dict.fromkeys(job.prompts)] + [("--negative", job.negative or "")]
    for what, text in texts:
        cut = loading.cut_text(tokenizer, text, limit)
        if cut:
            say(
                messages,
                f"warning: {what} {text!r} is longer than the model's {limit} tokens; this is cut off: {cut!r}",
                style="yellow",
            )


def _written(path: Path, write: Callable[[], T]) -> T:
    try:
        return write()
    except (OSError, ValueError) as error:  # ValueError: its place was good at the start and no longer is
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{path} could not be written: {reason}; nothing of it is left") from error


def _size_on_disk(path: Path) -> str:
    files = list(path.iterdir()) if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
