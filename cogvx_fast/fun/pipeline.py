"""The pipeline of CogVideoX-Fun's InP checkpoints, in plain torch, on the loop of diffusers' Fun control pipeline.

That loop puts the latents of a control video beside the noisy ones. Here these are the 17 channels of `conditions`.
diffusers' own pipeline for these checkpoints (its pull request 13331) is not merged; the class has its name, so that
what is saved will load there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import CogVideoXFunControlPipeline
from PIL import Image

from ..family import FRAMES_PER_LATENT, PIXELS_PER_LATENT, Variant, latent_frames
from ..hooks import unwrapped
from .conditions import Known, mask_latents, noised, of_frames, of_video
from .positions import stretched

NUM_FRAMES = 49
NOISE = 0.0563  # VideoX-Fun's; of the checkpoints whose configuration says `add_noise_in_inpaint_model`

Pictures = Image.Image | list[Image.Image]


@dataclass(frozen=True)
class _Given:
    """Of the call that runs: what the latents beside the noisy ones are made of, where the loop asks for them."""

    known: Known | None
    batch: int
    num_frames: int
    height: int
    width: int


_GIVEN: ContextVar[_Given] = ContextVar("cogvx_fast_fun_given")


class CogVideoXFunInpaintPipeline(CogVideoXFunControlPipeline):
    """First and last frame, or any others, and text to video."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        image: Pictures | None = None,
        last_image: Pictures | None = None,
        video: Any = None,
        mask_video: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        guidance_scale: float = 6.0,
        use_dynamic_cfg: bool = False,
        num_videos_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 - as in diffusers; never written to
        max_sequence_length: int = 226,
        noise_aug_strength: float = NOISE,
    ) -> Any:
        """Make videos of text and of what is known of them. What is not here is as in diffusers' pipelines.

        Args:
            image: the first frame, or a list of the first ones; the checkpoints were trained on one to four.
            last_image: the last frame, or a list of the last ones, in their order. Without `image` it is a case that
                they were hardly trained on.
            video, mask_video: instead of both, frames and which pixels of them are to be made: white ones. As lists of
                pictures, arrays or tensors, as diffusers takes videos.
            num_frames: of the video: 8N + 1, at most 49, and 8N + 5 for CogVideoX-Fun-V1.5. With `video` its length.
            noise_aug_strength: standard deviation of noise on known pixels, from -1 to 1; of checkpoints that were
                trained with it. It comes from `generator`, before the noise of the video.

        Raises:
            ValueError: for arguments that do not go together, before anything is computed.
        """
        config = Variant.of(unwrapped(self.transformer).config)
        height = height or config.sample_height * PIXELS_PER_LATENT
        width = width or config.sample_width * PIXELS_PER_LATENT
        _check(image, last_image, video, mask_video, num_videos_per_prompt, noise_aug_strength)
        _check_size(config, height, width)
        if video is None:
            num_frames = num_frames or min(NUM_FRAMES, config.sample_frames)
            _check_frames(config, num_frames, "num_frames")
            known = of_frames(_listed("image", image), _listed("last_image", last_image), num_frames, height, width)
        else:
            known, length = of_video(video, mask_video, height, width), _length(video)
            if num_frames not in (None, length):
                raise ValueError(f"num_frames={num_frames} is not the length of video, {length}; leave it out")
            num_frames = length
            _check_frames(config, num_frames, "the length of video,")
        batch = len(prompt) if isinstance(prompt, list) else 1 if prompt_embeds is None else len(prompt_embeds)
        if known is not None and noise_aug_strength > 0 and self._adds_noise():
            # First, so that a generation that is gone on with, whose latents are there, draws the same.
            pixels = known.pixels.to(self._execution_device).expand(batch, -1, -1, -1, -1)
            known = Known(noised(pixels, noise_aug_strength, generator), known.unknown)
        given = _Given(known, batch, num_frames, height, width)
        # Of which the loop looks at the length alone.
        like_latents = torch.empty(0, 0, num_frames, dtype=torch.float32, device="cpu")
        token = _GIVEN.set(given)
        try:
            with stretched(unwrapped(self.transformer).patch_embed):
                return super().__call__(
                    prompt=prompt,
                    negative_prompt=negative_prompt,
                    height=height,
                    width=width,
                    num_inference_steps=num_inference_steps,
                    timesteps=timesteps,
                    guidance_scale=guidance_scale,
                    use_dynamic_cfg=use_dynamic_cfg,
                    eta=eta,
                    generator=generator,
                    latents=latents,
                    control_video_latents=like_latents,
                    prompt_embeds=prompt_embeds,
                    negative_prompt_embeds=negative_prompt_embeds,
                    output_type=output_type,
                    return_dict=return_dict,
                    attention_kwargs=attention_kwargs,
                    callback_on_step_end=callback_on_step_end,
                    callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
                    max_sequence_length=max_sequence_length,
                )
        finally:
            _GIVEN.reset(token)

    def _adds_noise(self) -> bool:
        """Whether the checkpoint was trained with noise on what is known: its 5b and 1.5, not its 2b."""
        return bool(getattr(unwrapped(self.transformer).config, "add_noise_in_inpaint_model", False))

    def prepare_control_latents(
        self, mask: torch.Tensor | None = None, masked_image: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What the loop puts beside the noisy latents, `(batch, 17, latent frames, height / 8, width / 8)`."""
        given = _GIVEN.get(None)
        if given is None:
            return super().prepare_control_latents(mask, masked_image)
        transformer, device = unwrapped(self.transformer), self._execution_device
        dtype = transformer.dtype
        size = latent_frames(given.num_frames), given.height // PIXELS_PER_LATENT, given.width // PIXELS_PER_LATENT
        channels = transformer.config.in_channels - transformer.config.out_channels
        if given.known is None:  # not an encoded black clip: zeros, as it was trained
            return None, torch.zeros(given.batch, channels, *size, device=device, dtype=dtype)
        pixels, unknown = given.known.pixels.to(device), given.known.unknown.to(device)
        _, latents = super().prepare_control_latents(None, pixels.to(self.vae.dtype))
        known = mask_latents(unknown, *size) * self.vae_scaling_factor_image
        condition = torch.cat([known.to(dtype).expand(len(latents), -1, -1, -1, -1), latents.to(dtype)], dim=1)
        return None, condition.expand(given.batch, -1, -1, -1, -1)

    @functools.wraps(CogVideoXFunControlPipeline.decode_latents)
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        frames = super().decode_latents(latents)
        # Of an even number of latent frames the autoencoder makes four frames of the first, too, which is one.
        return frames[:, :, frames.shape[2] - (latents.shape[1] - 1) * FRAMES_PER_LATENT - 1 :]


def _check(image: Any, last_image: Any, video: Any, mask_video: Any, num_videos: int, noise: float) -> None:
    if (video is None) != (mask_video is None):
        missing, there = ("mask_video", "video") if mask_video is None else ("video", "mask_video")
        raise ValueError(f"{there} is given without {missing}, which says what of it is to be made; give both")
    if video is not None and (image is not None or last_image is not None):
        raise ValueError("image and last_image cannot be given with video and mask_video, which say it all")
    if num_videos != 1:
        raise ValueError(f"num_videos_per_prompt={num_videos} must be 1; give a list of prompts for several videos")
    if not 0 <= noise <= 1:
        raise ValueError(f"noise_aug_strength={noise} must be 0 to 1")


def _check_size(config: Variant, height: int, width: int) -> None:
    period = config.pixels_per_token
    for name, value in (("height", height), ("width", width)):
        if value % period or value < period:
            raise ValueError(f"{name}={value} must be a multiple of {period}")
    largest = config.largest_size
    if largest is not None and (height > largest[0] or width > largest[1]):
        raise ValueError(f"height={height} and width={width} must be at most {largest[0]} and {largest[1]}")


def _check_frames(config: Variant, num_frames: int, name: str) -> None:
    pairs = config.patch_size_t is not None
    right = num_frames >= 1 and (num_frames - 1) % FRAMES_PER_LATENT == 0
    right = right and (latent_frames(num_frames) % 2 == 0 if pairs else latent_frames(num_frames) % 2 == 1)
    if not right:
        kind = "8N + 5, as this checkpoint joins latent frames in pairs" if pairs else "8N + 1"
        joint = " " if name.endswith(",") else "="
        raise ValueError(f"{name}{joint}{num_frames} must be {kind}")


def _listed(name: str, pictures: Any) -> list[Image.Image]:
    if pictures is None:
        return []
    found = list(pictures) if isinstance(pictures, list | tuple) else [pictures]
    for picture in found:
        if not isinstance(picture, Image.Image):
            raise ValueError(f"{name} must be a PIL.Image.Image or a list of them, not a {type(picture).__name__}")
    return found


def _length(video: Any) -> int:
    if isinstance(video, list):
        return len(video[0]) if video and isinstance(video[0], list) else len(video)
    return video.shape[-4]
