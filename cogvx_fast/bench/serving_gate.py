"""Whether two servers make the frames that diffusers makes: no latency is stated of one that makes others."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import CogVideoXPipeline
from PIL import Image

from ..video import write_video
from .accuracy import Verdict, judge, psnr, reference_dtype, relative_error
from .reference import Pipeline, widened

DISTURBED = 8  # videos of the truth with noise, for each request


@dataclass(frozen=True)
class Judged:
    """Verdicts on the engine's server and on the baseline, and how far their videos are from each other: in decibels
    of the worst video, and in levels of 255 of the worst value."""

    ours: Verdict
    baseline: Verdict
    psnr_db: float
    max_difference: int


def compare(
    model: str,
    dtype: str,
    requests: Sequence[Mapping[str, Any]],
    ours: Sequence[bytes],
    baseline: Sequence[bytes],
) -> Judged:
    """Judge the MP4s of both servers by what diffusers makes in the precision that counts as the truth for `dtype`.

    Everything is compressed by the same writer and decoded again. H.264 makes of a few values that differ by one level
    of 255 a difference of a percent, or of nothing: what it decides for a block hangs on them. So a video's budget is
    not the error of the baseline alone, which is one throw of that die, but the largest of it and of the truth with
    noise as strong as diffusers' own rounding, which is measured before the writer, several times.

    Args:
        requests: their fields; `ours` and `baseline` are the videos of these.
    """
    precision = getattr(torch, dtype)
    pipe: Pipeline = CogVideoXPipeline.from_pretrained(model, dtype=precision)
    pipe.set_progress_bar_config(disable=True)
    truth = widened(pipe, reference_dtype(precision))
    errors, of_baseline, own, decibels, largest = [], [], [], [], 0
    for asked, our_video, baseline_video in zip(requests, ours, baseline, strict=True):
        exact, rounded = _made(truth, asked, precision), _made(pipe, asked, precision)
        expected, first, second = frames(_mp4(exact, asked)), frames(our_video), frames(baseline_video)
        rounding = relative_error(rounded, exact)
        possible = [frames(_mp4(disturbed(exact, rounding, seed), asked)) for seed in range(DISTURBED)]
        errors.append(relative_error(first, expected))
        of_baseline.append(relative_error(second, expected))
        own.append(max(of_baseline[-1], *(relative_error(video, expected) for video in possible)))
        decibels.append(psnr(first / 255, second / 255))
        largest = max(largest, int((first - second).abs().max()))
    return Judged(judge(errors, own), judge(of_baseline, own), min(decibels), largest)


def disturbed(exact: torch.Tensor, error: float, seed: int) -> torch.Tensor:
    """Frames with Gaussian noise whose norm is `error` of theirs."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(exact.shape, generator=generator, dtype=exact.dtype, device=exact.device)
    return exact + noise * (error * exact.norm() / noise.norm())


def _made(pipe: Pipeline, asked: Mapping[str, Any], noise_dtype: torch.dtype) -> torch.Tensor:
    """The frames of a request `(frames, height, width, 3)` in [0, 1], from noise that is rounded as the servers'."""
    arguments = {name: value for name, value in asked.items() if name not in ("seed", "fps")}
    latents = pipe.prepare_latents(
        1,
        pipe.transformer.config.in_channels,
        asked["num_frames"],
        asked["height"],
        asked["width"],
        noise_dtype,
        torch.device("cpu"),
        torch.Generator().manual_seed(asked["seed"]),
    )
    made = pipe(**arguments, latents=latents.to(pipe.transformer.dtype), output_type="pt").frames[0]
    return made.permute(0, 2, 3, 1).double()


def _mp4(made: torch.Tensor, asked: Mapping[str, Any]) -> bytes:
    """Frames as the servers write them: rounded to levels as diffusers rounds them."""
    levels = (made.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    with tempfile.TemporaryDirectory() as folder:
        images = [Image.fromarray(frame) for frame in levels]
        return write_video(images, Path(folder) / "video.mp4", asked["fps"], repeatable=True).read_bytes()


def frames(mp4: bytes) -> torch.Tensor:
    """`(frames, height, width, 3)` of 0 to 255, float32."""
    import av  # nothing else of the benchmarks needs it

    with av.open(io.BytesIO(mp4), "r") as container:
        found = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(found)).float()
