"""Makes the video of a job: from its order, or where it was parked, to a file."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from cogvx_fast import FastCogVideoXVideoToVideoPipeline, threads
from cogvx_fast.cli import degrees, loading
from cogvx_fast.devices import is_out_of_memory
from cogvx_fast.family import decoded_frames, latent_frames
from cogvx_fast.resume import Parked, ResumableGeneration, Step

from .files import Files
from .jobs import Job
from .orders import Order, Served
from .progress import Progress
from .settings import Settings
from .team import Team


@dataclass(frozen=True)
class Video:
    """What became of a job: `bytes` of its file, and what is kept of how it was made."""

    result: Mapping[str, Any]
    bytes: int


@dataclass(frozen=True)
class Task:
    """What all processes of a worker do for one video, up to its frames.

    Attributes:
        arguments: of the pipeline's call, without those of `ResumableGeneration`.
        parked: where it goes on; None: at the start.
    """

    order: Order
    arguments: Mapping[str, Any]
    parked: Parked | None = None


class TextCache:
    """Embeddings of the texts that were used last; the empty one, which is most negative prompts, stays."""

    def __init__(self, encode: Callable[[str], torch.Tensor], size: int) -> None:
        self._encode, self._size = encode, size
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._empty = encode("")

    def get(self, text: str) -> torch.Tensor:
        """`(1, tokens, width)`."""
        if not text:
            return self._empty
        if text not in self._kept:
            self._kept[text] = self._encode(text)
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)
        self._kept.move_to_end(text)
        return self._kept[text]


class Maker:
    """A pipeline that is loaded and warm: kernels are built, and a first video was made.

    Its results do not depend on what it made before, nor on who else is busy: it keeps its number of threads.

    Args:
        team: the processes that make each video together.

    Attributes:
        pipe: the pipeline of text to video, or of a picture and text.
        warm: what warming up took, as `estimate.Estimator.learn_from` wants it.
    """

    def __init__(self, settings: Settings, team: Team | None = None) -> None:
        self._settings, self.team = settings, team or Team()
        device = settings.devices[self.team.rank]
        served = Served.of(settings.model, "", settings.engine, settings.memory_limit, settings.dtype, device)
        engine = served.engine
        if self.team.size > 1:
            heads = served.checkpoint.variant.num_attention_heads
            parallel = degrees.parse(settings.parallel, self.team.size, heads)
            engine = dataclasses.replace(engine, parallel=parallel)
        with loading.quiet_libraries():
            self.pipe: Any = loading.load_pipeline(
                served.checkpoint,
                served.dtype,
                served.device,
                engine,
                scheduler=None,
                pipeline="FastCogVideoXImageToVideoPipeline" if served.takes_picture else "FastCogVideoXPipeline",
                reads_text=self.team.is_first,
            )
        self._takes_picture = served.takes_picture
        self._variant = served.checkpoint.variant
        self._schedulers: dict[str | None, Any] = {None: self.pipe.scheduler}
        self._video_to_video: Any = None
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        with self._steady():
            if self.team.is_first:
                self._texts = TextCache(self._encode, settings.cached_texts)
                self._preview = _preview_of(self.pipe.vae)
            self._warm()

    @contextlib.contextmanager
    def _steady(self) -> Iterator[None]:
        with threads.fixed(torch.get_num_threads()), loading.quiet_libraries():
            yield

    def _encode(self, text: str) -> torch.Tensor:
        with torch.no_grad():
            return self.pipe.encode_prompt(
                text,
                do_classifier_free_guidance=False,
                max_sequence_length=self._variant.max_text_seq_length,
                device=self.pipe._execution_device,
            )[0]

    def _warm(self) -> None:
        """Two steps of the smallest video that shows all of it. What they take is measured the second time, as the
        first one may build kernels; but where the smallest is a whole one, it is decoded only once."""
        period, side = self._variant.frame_period, 4 * self._variant.pixels_per_token
        height, width = (min(side, most) for most in self._variant.largest_size or (side, side))
        frames = period + 1
        if self._variant.use_learned_positional_embeddings:
            (height, width), frames = self._variant.default_size, self._variant.sample_frames
        order = Order("", "warm", None, width, height, frames, 2, 6.0, 0, 8, "")
        arguments: dict[str, Any] = {}
        if self.team.is_first:
            arguments = self._arguments(order) | {"num_frames": frames}
            if self._takes_picture:
                arguments["image"] = Image.new("RGB", (width, height))
        task = self.team.say(Task(order, arguments))
        ends: list[float] = []

        def note(step: Step) -> bool:
            step.latents.cpu()  # when it is made, not when a GPU was told to
            ends.append(time.perf_counter())
            return False

        latents = self._generation(task).run(note)
        assert latents is not None
        for _ in range(1 if self._variant.use_learned_positional_embeddings else 2):
            started = time.perf_counter()
            for pixels in self.pipe.decode_stream(latents, decoded_frames(latent_frames(frames))):
                pixels.cpu()
        # Not the text: it takes as long for a large video, and what is kept here grows with the size.
        seconds = {"denoise": ends[1] - ends[0], "decode": time.perf_counter() - started}
        self.warm = {"request": dataclasses.asdict(order), "stage_seconds": seconds, "made_steps": 1}

    def _arguments(self, order: Order) -> dict[str, Any]:
        guided = order.guidance_scale > 1
        return {
            "prompt_embeds": self._embeddings(order.prompt),
            "negative_prompt_embeds": self._embeddings(order.negative_prompt or "") if guided else None,
            "height": order.height,
            "width": order.width,
            "num_inference_steps": order.num_inference_steps,
            "guidance_scale": order.guidance_scale,
        }

    def _embeddings(self, text: str) -> torch.Tensor:
        """Those of several devices go to other processes, which have devices of their own."""
        found = self._texts.get(text)
        return found if self.team.size == 1 else found.cpu()

    def _generation(self, task: Task) -> ResumableGeneration:
        device, order = self.pipe._execution_device, task.order
        arguments = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in task.arguments.items()
        }
        scheduler = self._scheduler(order.scheduler)
        return ResumableGeneration(self._pipeline(order), [order.seed], arguments, scheduler, task.parked)

    def _decoded(self, order: Order, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """The frames, piece by piece."""
        frames = decoded_frames(latent_frames(order.num_frames))
        return self.team.in_turn(self._pipeline(order).decode_stream(latents, frames))

    def follow(self) -> None:
        """In the others of several processes: do what the first one does, for as long as it lives."""
        while True:
            task: Any = self.team.say(None)
            with self._steady():
                latents = self._generation(task).run(lambda _: self.team.decide(lambda: False))
                if latents is not None:
                    for _ in self._decoded(task.order, latents):
                        pass

    def _pipeline(self, order: Order) -> Any:
        if order.strength is None:
            return self.pipe
        if self._video_to_video is None:
            self._video_to_video = FastCogVideoXVideoToVideoPipeline.from_pipe(self.pipe)
            self._video_to_video.set_progress_bar_config(disable=True)
        return self._video_to_video

    def _scheduler(self, name: str | None) -> Any:
        if name not in self._schedulers:
            self._schedulers[name] = loading.make_scheduler(str(name), self.pipe.scheduler)
        return self._schedulers[name]

    def make(self, job: Job, files: Files, after_step: Callable[[int], bool], between: Callable[[], bool]) -> Video:
        """Make the video of a job and write it.

        Args:
            after_step: is told how many steps are done; True parks.
            between: is asked while frames are decoded; True parks.

        Raises:
            ParkedError: when it was parked.
            StorageFullError: if there is no room for it; where it can be, it is parked.
            Whatever else the pipeline and these functions raise.
        """
        with self._steady():
            return self._make(Progress(self._settings, job, files, after_step, between, self._preview))

    def _make(self, making: Progress) -> Video:
        order, parked = making.order, making.parked()
        with making.stage("text"):
            arguments = self._arguments(order)
        if order.strength is None:
            arguments["num_frames"] = order.num_frames
            if self._takes_picture:  # also where it goes on: it is encoded again, with the same draws
                arguments["image"] = making.picture()
        else:
            arguments["strength"] = order.strength
            if parked is None:
                arguments["video"] = making.reference()
        task = Task(order, arguments, parked)
        generation = self._generation(task)
        with self.team.task(task):
            with making.stage("denoise"):
                latents = generation.run(lambda step: self.team.decide(lambda: making.after_step(step, generation)))
            if latents is None:
                raise making.parks(generation.parked)
            self.team.done()
            report = str(self._pipeline(order).engine_report())
            size = making.write(self._decoded(order, latents), self.pipe.video_processor)
        return Video({**making.so_far(), "engine_report": report, "warnings": self._warnings(order)}, size)

    def _warnings(self, order: Order) -> list[str]:
        limit, found = self._variant.max_text_seq_length, []
        for name, text in (("prompt", order.prompt), ("negative_prompt", order.negative_prompt or "")):
            cut = loading.cut_text(self.pipe.tokenizer, text, limit)
            if cut:
                found.append(f"{name} is longer than the model's {limit} tokens; this was cut off: {cut!r}")
        return found

    def what_went_wrong(self, error: Exception) -> tuple[str, str, bool]:
        """Why a job failed: a code, words for its owner, and whether this process can make the next one."""
        words, in_step = " ".join(str(error).split())[:500], self.team.is_in_step
        if is_out_of_memory(error):
            return "out_of_memory", f"the device ran out of memory; ask for fewer frames or pixels ({words})", in_step
        if isinstance(error, ValueError):
            return "generation_failed", f"no video could be made: {words}", in_step
        return "internal_error", f"no video could be made: {type(error).__name__}", False


def _preview_of(vae: Any) -> Any:
    """The map from latents to small pictures; None where this version has none."""
    try:
        module = importlib.import_module("cogvx_fast.preview")
    except ImportError:
        return None
    return module.LatentPreview.fit(vae)
