"""From what a request asks for to an order that can be made, by the checks of the command line, before it is queued."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cogvx_fast.cli import loading, validate
from cogvx_fast.cli.checkpoint import ARGUMENT, Checkpoint, read_checkpoint
from cogvx_fast.cli.console import UsageError
from cogvx_fast.cli.prediction import fitted, loaded_models, request_of, room_error
from cogvx_fast.config import EngineConfig
from cogvx_fast.video import max_fps

if TYPE_CHECKING:
    from cogvx_fast.memory import Models

# The command line's names of what requests call otherwise.
_NAMES = {
    "PROMPT": "prompt",
    "--negative": "negative_prompt",
    "--steps": "num_inference_steps",
    "--guidance": "guidance_scale",
    "--frames": "num_frames",
    "--height": "height",
    "--width": "width",
    "--seed": "seed",
    "--fps": "fps",
    "--model": "model",
}
_OPTION = re.compile(r"--[a-z-]+|PROMPT")
MAX_PROMPT = 32_000  # characters, as in OpenAI's API
SCHEDULERS = ("ddim", "dpm")
DEFAULT_STEPS, DEFAULT_GUIDANCE, DEFAULT_STRENGTH = 50, 6.0, 0.8  # diffusers'
_OF_PICTURES = "CogVideoXImageToVideoPipeline"


@dataclass(frozen=True)
class Order:
    """One video, all decided.

    Attributes:
        scheduler: "ddim", "dpm", or None for the checkpoint's own.
        strength: how much of the reference video is made anew, 0 to 1; None: there is no reference.
    """

    model: str
    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    fps: int
    engine: str
    scheduler: str | None = None
    strength: float | None = None

    @property
    def steps(self) -> int:
        """The steps that are really made: with a reference as many as its strength says."""
        return self.num_inference_steps if self.strength is None else int(self.num_inference_steps * self.strength)

    @property
    def work(self) -> int:
        """Pixels of all frames, times steps."""
        return self.width * self.height * self.num_frames * self.steps


@dataclass(frozen=True)
class Served:
    """A model that a server has, and what it may be asked for.

    Attributes:
        name: by which requests know it.
    """

    name: str
    checkpoint: Checkpoint
    engine: EngineConfig
    dtype: str
    device: str

    @classmethod
    def of(
        cls, model: str, name: str, engine: str | None, memory_limit: str | None, dtype: str | None, device: str | None
    ) -> Served:
        """Raises a UsageError for what cannot be served, from the checkpoint's JSON files alone."""
        checkpoint = read_checkpoint(model)
        if checkpoint.pipeline_class != _OF_PICTURES:
            validate.check_text_only(checkpoint)
        elif checkpoint.variant.in_channels != 2 * checkpoint.variant.out_channels:
            reason = (
                f"its transformer has in_channels {checkpoint.variant.in_channels}, which {_OF_PICTURES} cannot run"
            )
            raise UsageError(ARGUMENT, repr(checkpoint.source), reason)
        config = loading.choose_engine(engine, memory_limit, checkpoint)
        place = loading.choose_device(device)
        precision = loading.choose_dtype(dtype, place, checkpoint)
        if config.memory_limit is not None:
            variant = checkpoint.variant
            size = request_of(checkpoint, *variant.default_size, variant.sample_frames)
            config = fitted(checkpoint, size, precision, place, config)
        return cls(name, checkpoint, config, precision, place)

    @functools.cached_property
    def _loaded(self) -> tuple[Models, EngineConfig]:
        """Made once: a tenth of a second, in which a request would wait and a CPU would not denoise."""
        return loaded_models(self.checkpoint, self.engine)

    @property
    def takes_picture(self) -> bool:
        """Whether it makes videos of a picture and text; else of text, or of a video and text."""
        return self.checkpoint.pipeline_class == _OF_PICTURES

    @property
    def tier(self) -> str:
        return self.engine.tier or "balanced"

    def warm_up(self) -> None:
        """Check a request, so that the first one is answered as quickly as the tenth."""
        with contextlib.suppress(UsageError):  # of a machine that has no room for the usual size
            self._order({"prompt": "warm", "picture": True} if self.takes_picture else {"prompt": "warm"})

    def order(self, asked: Mapping[str, Any]) -> Order:
        """The order of a request that means this model.

        Args:
            asked: by the names of `schemas.Create`, without what is not given; `reference_frames`: of a video that
                came with it; `picture`: whether one did, for a model that takes it.

        Raises:
            UsageError: of a parameter of the request that cannot work.
        """
        try:
            return self._order(asked)
        except UsageError as error:
            raise _as_of_a_request(error) from None

    def _order(self, asked: Mapping[str, Any]) -> Order:
        variant = self.checkpoint.variant
        if asked.get("engine", self.tier) != self.tier:
            raise UsageError("engine", repr(asked["engine"]), f"is not served here; must be {self.tier!r}")
        prompt = asked.get("prompt")
        if prompt is not None and len(prompt) > MAX_PROMPT:
            raise UsageError("prompt", None, f"has {len(prompt)} characters; must be at most {MAX_PROMPT}")
        (prompt,) = validate.read_prompts(prompt, None)
        negative = asked.get("negative_prompt")
        if negative is not None and len(negative) > MAX_PROMPT:
            raise UsageError("negative_prompt", None, f"has {len(negative)} characters; must be at most {MAX_PROMPT}")
        negative = None if negative is None else validate.as_text("negative_prompt", negative)
        steps, guidance = (
            asked.get("num_inference_steps", DEFAULT_STEPS),
            float(asked.get("guidance_scale", DEFAULT_GUIDANCE)),
        )
        seed = asked.get("seed", secrets.randbelow(2**31))
        validate.check_numbers(steps, guidance, negative, seed, 1, self.checkpoint)
        width, height = _size(asked)
        height, width = validate.video_size(height, width, variant)
        fps = asked.get("fps", variant.default_fps)
        if not 1 <= fps <= max_fps("video.gif"):
            raise UsageError("fps", fps, f"must be 1 to {max_fps('video.gif')}")
        num_frames = validate.num_frames(_frames(asked, fps), variant)
        scheduler = asked.get("scheduler")
        if scheduler not in (None, *SCHEDULERS):
            raise UsageError("scheduler", repr(scheduler), f"must be {' or '.join(SCHEDULERS)}")
        if self.takes_picture:
            _check_picture(asked)
        strength = None if self.takes_picture else _strength(asked, steps, num_frames)
        size = dataclasses.replace(
            request_of(self.checkpoint, height, width, num_frames), steps=steps, guided=guidance > 1, streams=True
        )
        too_much = room_error(self.checkpoint, size, self.dtype, self.device, self.engine, loaded=self._loaded)
        if too_much is not None:
            raise validate.too_large(num_frames, height, width, self.checkpoint, too_much)
        return Order(
            model=self.name,
            prompt=prompt,
            negative_prompt=negative,
            width=width,
            height=height,
            num_frames=num_frames,
            num_inference_steps=steps,
            guidance_scale=guidance,
            seed=seed,
            fps=fps,
            engine=self.tier,
            scheduler=scheduler,
            strength=strength,
        )


def _size(asked: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Width and height, from either way of saying them."""
    width, height, size = asked.get("width"), asked.get("height"), asked.get("size")
    if size is None:
        return width, height
    found = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", size)
    if found is None:
        raise UsageError("size", repr(size), "must be WIDTHxHEIGHT in pixels, such as 720x480")
    of_size = int(found[1]), int(found[2])
    for name, value, same in (("width", width, of_size[0]), ("height", height, of_size[1])):
        if value not in (None, same):
            raise UsageError(name, value, f"is not that of size {size}; give one of both")
    return of_size


def _frames(asked: Mapping[str, Any], fps: int) -> int | None:
    """How many frames, from either way of saying it: a video of N seconds has N * fps frames and one more."""
    frames, seconds = asked.get("num_frames"), asked.get("seconds")
    if seconds is None:
        return frames
    found = re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,6})?", seconds)
    if found is None or float(seconds) == 0:
        raise UsageError("seconds", repr(seconds), 'must be a number of seconds as a string, such as "4"')
    of_seconds = round(float(seconds) * fps) + 1
    if frames not in (None, of_seconds):
        raise UsageError("num_frames", frames, f"is not that of {seconds} seconds, {of_seconds}; give one of both")
    return of_seconds


def _strength(asked: Mapping[str, Any], steps: int, num_frames: int) -> float | None:
    strength, there = asked.get("strength"), asked.get("reference_frames")
    if there is None:
        if strength is not None:
            raise UsageError("strength", strength, "has no effect without input_reference; leave it out")
        return None
    if there < num_frames:
        raise UsageError("input_reference", None, f"has {there} frames, {num_frames} are to be made")
    strength = DEFAULT_STRENGTH if strength is None else strength
    if not 0 < strength <= 1 or int(steps * strength) < 1:
        least = f"{1 / steps:.2g}"
        raise UsageError("strength", strength, f"must be {least} to 1 for {steps} steps")
    return float(strength)


def _check_picture(asked: Mapping[str, Any]) -> None:
    if not asked.get("picture"):
        allowed = "is missing: this model makes videos of a picture and text; give a PNG, JPEG or WebP"
        raise UsageError("input_reference", None, allowed)
    if asked.get("strength") is not None:
        raise UsageError("strength", asked["strength"], "has no effect on a model that begins with a picture")


def _as_of_a_request(error: UsageError) -> UsageError:
    """The same with the names of requests, also in its words."""
    allowed = _OPTION.sub(lambda found: _NAMES.get(found[0], found[0].strip("-")), error.allowed)
    return UsageError(_NAMES.get(error.argument, error.argument), error.value, allowed)
