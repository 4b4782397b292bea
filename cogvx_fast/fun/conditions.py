"""What an InP checkpoint is told of the frames that are known: 17 channels beside the 16 of the noisy latents.

As VideoX-Fun makes them (`videox_fun/pipeline/pipeline_cogvideox_fun_inpaint.py` at 804a4258): one channel that says
where the video is known, and the latents of the video with all else black. The model was trained on exactly that,
oddities too: the mask is shrunk to latent frames by interpolation, so that one known last frame, which stands between
no two others, does not show in it; the frame itself is in the latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from PIL import Image

_BLACK = -1.0  # what an unknown pixel is, of values from -1 to 1


@dataclass(frozen=True)
class Known:
    """What is known of a video.

    Attributes:
        pixels: `(1, 3, frames, height, width)` from -1 to 1; black where it is not known.
        unknown: `(1, 1, frames, height, width)`, 1 where a pixel is to be made and 0 where it is known.
    """

    pixels: torch.Tensor
    unknown: torch.Tensor


def of_frames(
    first: Sequence[Image.Image], last: Sequence[Image.Image], num_frames: int, height: int, width: int
) -> Known | None:
    """The first and the last frames of a video; pictures are stretched to its size.

    Returns:
        None where there are neither: a video of text alone.

    Raises:
        ValueError: for more frames than the video has.
    """
    if not first and not last:
        return None
    if len(first) + len(last) > num_frames:
        raise ValueError(
            f"image and last_image are {len(first)} and {len(last)} frames, more than num_frames={num_frames}"
        )
    pixels = torch.full((1, 3, num_frames, height, width), _BLACK, dtype=torch.float32, device="cpu")
    unknown = torch.ones(1, 1, num_frames, height, width, dtype=torch.float32, device="cpu")
    places = [*range(len(first)), *range(num_frames - len(last), num_frames)]
    processor = VideoProcessor(vae_scale_factor=8)
    for place, picture in zip(places, [*first, *last], strict=True):
        stretched = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        pixels[0, :, place] = processor.preprocess(stretched, height=height, width=width)[0]
        unknown[:, :, place] = 0
    return Known(pixels, unknown)


def of_video(video: Any, mask_video: Any, height: int, width: int) -> Known | None:
    """A video and which of it is to be made anew.

    Args:
        video: as diffusers' pipelines take it: a list of pictures, or an array or tensor of frames.
        mask_video: likewise; white is made, black is kept.

    Returns:
        None where nothing of it is known.

    Raises:
        ValueError: for two of different length, and for several videos.
    """
    processor = VideoProcessor(vae_scale_factor=8)
    masks = VideoProcessor(vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    pixels = processor.preprocess_video(video, height=height, width=width).float()
    unknown = masks.preprocess_video(mask_video, height=height, width=width).float()[:, :1]
    if len(pixels) != 1 or len(unknown) != 1:
        raise ValueError(f"video and mask_video must be one video each, not {len(pixels)} and {len(unknown)}")
    if pixels.shape[2] != unknown.shape[2]:
        raise ValueError(f"mask_video has {unknown.shape[2]} frames, video has {pixels.shape[2]}: must be as many")
    if bool(unknown.all()):
        return None
    return Known(torch.where(unknown > 0.5, _BLACK, pixels), unknown)


def noised(
    pixels: torch.Tensor, strength: float, generator: torch.Generator | list[torch.Generator] | None
) -> torch.Tensor:
    """Known pixels with a little noise, as some of the checkpoints were trained; black ones stay black.

    Args:
        pixels: `(batch, 3, frames, height, width)` from -1 to 1.
        strength: its standard deviation.
    """
    noise = randn_tensor(pixels.shape, generator=generator, device=pixels.device, dtype=pixels.dtype)
    return torch.where(pixels == _BLACK, pixels, pixels + strength * noise)


def mask_latents(unknown: torch.Tensor, frames: int, height: int, width: int) -> torch.Tensor:
    """The mask's channel before it is scaled: 1 where the video is known.

    Args:
        unknown: `(batch, 1, video frames, pixels, pixels)`.
        frames, height, width: of the latents.

    Returns:
        `(batch, 1, frames, height, width)`.
    """
    known = 1 - unknown

    def shrunk(part: torch.Tensor, length: int) -> torch.Tensor:
        return F.interpolate(part, size=(length, height, width), mode="trilinear", align_corners=False)

    first = shrunk(known[:, :, :1], 1)
    if frames == 1:
        return first
    return torch.cat([first, shrunk(known[:, :, 1:], frames - 1)], dim=2)
