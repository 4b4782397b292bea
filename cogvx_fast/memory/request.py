"""The size of a generation: of a pipeline's default clip, or of what it was called with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from diffusers import (
    CogVideoXFunControlPipeline,
    CogVideoXImageToVideoPipeline,
    CogVideoXVideoToVideoPipeline,
    DiffusionPipeline,
)

from ..family import PIXELS_PER_LATENT, TEXT_TOKENS, Variant, latent_frames


@dataclass(frozen=True)
class Request:
    """The size of one generation.

    Attributes:
        height, width: in pixels.
        text_tokens: of a prompt, as it is padded.
        videos: made at once.
        guided: whether a step has two samples for each of them.
        steps: of denoising; 0 where latents that are there are decoded, and nothing else.
        encodes: how many frames the autoencoder encodes before the first step.
        streams: whether frames are decoded a few at a time, and not joined.
    """

    num_frames: int
    height: int
    width: int
    text_tokens: int = TEXT_TOKENS
    videos: int = 1
    guided: bool = True
    steps: int = 50
    encodes: int = 0
    streams: bool = False

    @classmethod
    def default(cls, variant: Variant, pipeline_class: type[DiffusionPipeline] | None = None, **fields: Any) -> Request:
        """What a pipeline makes with no size given, or `fields` instead."""
        height, width = variant.default_size
        size: dict[str, Any] = {
            "num_frames": variant.sample_frames,
            "height": height,
            "width": width,
            "text_tokens": variant.max_text_seq_length,
        } | fields
        return cls(**({"encodes": _encoded(pipeline_class, size["num_frames"])} | size))

    @classmethod
    def of_call(
        cls, variant: Variant, pipeline_class: type[DiffusionPipeline], arguments: Mapping[str, Any]
    ) -> Request:
        """What a pipeline makes when it is called with `arguments`, by name; those that are wrong count as not given:
        the pipeline itself says so."""
        default = cls.default(variant, pipeline_class)
        video = arguments.get("video", arguments.get("control_video"))
        frames = _number(arguments.get("num_frames")) or (_length(video) if video is not None else None)
        frames = frames or default.num_frames
        # Unlike the command, a pipeline takes the configuration at its word.
        height = _number(arguments.get("height")) or variant.sample_height * PIXELS_PER_LATENT
        width = _number(arguments.get("width")) or variant.sample_width * PIXELS_PER_LATENT
        prompt, embeds = arguments.get("prompt"), arguments.get("prompt_embeds")
        return cls(
            num_frames=frames,
            height=height,
            width=width,
            text_tokens=_number(arguments.get("max_sequence_length")) or default.text_tokens,
            videos=len(prompt) if isinstance(prompt, list) else len(embeds) if embeds is not None else 1,
            guided=is_guided(arguments),
            steps=_number(arguments.get("num_inference_steps")) or default.steps,
            encodes=_encoded(pipeline_class, frames),
            streams=arguments.get("output_type") == "latent",
        )

    @classmethod
    def of_decoding(cls, num_frames: int, height: int, width: int, videos: int = 1, streams: bool = False) -> Request:
        """Decoding alone, of latents that are there."""
        return cls(num_frames, height, width, videos=videos, steps=0, streams=streams)

    @property
    def latents(self) -> tuple[int, int, int]:
        """Frames, height and width of a video's latents."""
        return latent_frames(self.num_frames), self.height // PIXELS_PER_LATENT, self.width // PIXELS_PER_LATENT

    def of_frames(self, num_frames: int) -> Request:
        """This request with another number of frames."""
        return replace(self, num_frames=num_frames, encodes=min(self.encodes, num_frames))

    @property
    def least(self) -> Request:
        """The least that can be made at this resolution: one frame, in one step, without guidance."""
        return replace(self.of_frames(1), videos=1, guided=False, steps=min(self.steps, 1), streams=True)

    def has_size_of(self, variant: Variant) -> bool:
        """Whether that is the size in the configuration, for which the model has a table of positions."""
        size = variant.sample_frames, variant.sample_height, variant.sample_width
        return (self.num_frames, *self.latents[1:]) == size

    def __str__(self) -> str:
        several = f"{self.videos} videos of " if self.videos > 1 else ""
        return f"{several}{self.num_frames} frames of {self.width}x{self.height}"


def _encoded(pipeline_class: type[DiffusionPipeline] | None, num_frames: int) -> int:
    """How many frames a pipeline of that class encodes before the first step."""
    if pipeline_class is None:
        return 0
    if issubclass(pipeline_class, CogVideoXVideoToVideoPipeline | CogVideoXFunControlPipeline):
        return num_frames
    return 1 if issubclass(pipeline_class, CogVideoXImageToVideoPipeline) else 0


def is_guided(arguments: Mapping[str, Any]) -> bool:
    """Whether a pipeline that is called with `arguments`, by name, has guidance."""
    scale = arguments.get("guidance_scale", 6)
    return not isinstance(scale, int | float) or scale > 1


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _length(video: Any) -> int | None:
    """The frames of a video as pipelines take it: a list of frames or of videos, or a tensor of four or five axes."""
    if isinstance(video, list):
        return len(video[0]) if video and isinstance(video[0], list) else len(video)
    shape: tuple[int, ...] = getattr(video, "shape", ())
    return shape[-4] if len(shape) >= 4 else None
