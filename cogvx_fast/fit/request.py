"""The size of a generation: of a pipeline's default clip, or of what it was called with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from diffusers import CogVideoXFunControlPipeline, CogVideoXImageToVideoPipeline, CogVideoXVideoToVideoPipeline

PIXELS_PER_LATENT, FRAMES_PER_LATENT = 8, 4  # of the family's autoencoder


@dataclass(frozen=True)
class Request:
    """
    Attributes:
        height, width: in pixels.
        videos: made at once.
        guided: whether a step has two samples for each of them.
        encodes: how many frames the autoencoder encodes before the first step.
        streams: whether frames are decoded a few at a time, and not joined.
    """

    num_frames: int
    height: int
    width: int
    text_tokens: int = 226
    videos: int = 1
    guided: bool = True
    steps: int = 50
    encodes: int = 0
    streams: bool = False

    @classmethod
    def default(cls, transformer: Mapping[str, Any], pipeline_class: type | None = None, **fields: Any) -> Request:
        """What a pipeline makes with no size given, or `fields` instead.

        Args:
            transformer: its configuration.
        """
        height, width = default_latents(
            transformer["sample_height"], transformer["sample_width"], transformer.get("patch_size_t")
        )
        size = {
            "num_frames": int(transformer["sample_frames"]),
            "height": height * PIXELS_PER_LATENT,
            "width": width * PIXELS_PER_LATENT,
            "text_tokens": transformer["max_text_seq_length"],
        } | fields
        return cls(**({"encodes": _encoded(pipeline_class, size["num_frames"])} | size))

    @classmethod
    def of_call(cls, transformer: Mapping[str, Any], pipeline_class: type, arguments: Mapping[str, Any]) -> Request:
        """What a pipeline makes when it is called with `arguments`, by name; those that are wrong count as not given:
        the pipeline itself says so."""
        default = cls.default(transformer, pipeline_class)
        video = arguments.get("video", arguments.get("control_video"))
        frames = _number(arguments.get("num_frames")) or (_length(video) if video is not None else None)
        frames = frames or default.num_frames
        # Unlike the command, a pipeline takes the configuration at its word.
        height = _number(arguments.get("height")) or transformer["sample_height"] * PIXELS_PER_LATENT
        width = _number(arguments.get("width")) or transformer["sample_width"] * PIXELS_PER_LATENT
        prompt, embeds = arguments.get("prompt"), arguments.get("prompt_embeds")
        scale = arguments.get("guidance_scale", 6)
        return cls(
            num_frames=frames,
            height=height,
            width=width,
            text_tokens=_number(arguments.get("max_sequence_length")) or default.text_tokens,
            videos=len(prompt) if isinstance(prompt, list) else len(embeds) if embeds is not None else 1,
            guided=not isinstance(scale, int | float) or scale > 1,
            steps=_number(arguments.get("num_inference_steps")) or default.steps,
            encodes=_encoded(pipeline_class, frames),
            streams=arguments.get("output_type") == "latent",
        )

    @property
    def latent_frames(self) -> int:
        return (self.num_frames - 1) // FRAMES_PER_LATENT + 1

    @property
    def latents(self) -> tuple[int, int, int]:
        """Frames, height and width of a video's latents."""
        return self.latent_frames, self.height // PIXELS_PER_LATENT, self.width // PIXELS_PER_LATENT

    def of_frames(self, num_frames: int) -> Request:
        """The same with another number of frames."""
        return replace(self, num_frames=num_frames, encodes=min(self.encodes, num_frames))

    @property
    def least(self) -> Request:
        """The least that can be made at this resolution: one frame, in one step, without guidance."""
        return replace(self.of_frames(1), videos=1, guided=False, steps=1, streams=True)

    def has_size_of(self, transformer: Mapping[str, Any]) -> bool:
        """Whether that is the size in a transformer's configuration."""
        size = transformer["sample_frames"], transformer["sample_height"], transformer["sample_width"]
        return (self.num_frames, *self.latents[1:]) == size

    def video_tokens(self, patch_size: int, patch_size_t: int | None) -> int:
        """Of one video; where a patch has several frames, a pipeline fills up the last."""
        frames, height, width = self.latents
        return -(-frames // (patch_size_t or 1)) * (height // patch_size) * (width // patch_size)

    def __str__(self) -> str:
        several = f"{self.videos} videos of " if self.videos > 1 else ""
        return f"{several}{self.num_frames} frames of {self.width}x{self.height}"


def default_latents(height: int, width: int, patch_size_t: int | None) -> tuple[int, int]:
    """The height and width of a model's own clip, in latent pixels, from those in its configuration.

    CogVideoX 1.5 gives the largest size of its position table (300 x 300) instead of its own.
    """
    return (96, 170) if patch_size_t is not None and height >= 96 and width >= 170 else (height, width)


def _encoded(pipeline_class: type | None, num_frames: int) -> int:
    if pipeline_class is not None and issubclass(
        pipeline_class, CogVideoXVideoToVideoPipeline | CogVideoXFunControlPipeline
    ):
        return num_frames
    return 1 if pipeline_class is not None and issubclass(pipeline_class, CogVideoXImageToVideoPipeline) else 0


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _length(video: Any) -> int | None:
    """The frames of a video as pipelines take it: a list of frames or of videos, or a tensor of four or five axes."""
    if isinstance(video, list):
        return len(video[0]) if video and isinstance(video[0], list) else len(video)
    shape = getattr(video, "shape", ())
    return shape[-4] if len(shape) >= 4 else None
