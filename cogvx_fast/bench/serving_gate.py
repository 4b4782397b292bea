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

from ..video import write_video
from .accuracy import Verdict, judge, psnr, reference_dtype, relative_error
from .reference import Pipeline, widened


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

    All three are compressed by the same writer and decoded again, so that what that costs is in all of them.

    Args:
        requests: their fields; `ours` and `baseline` are the videos of these.
    """
    precision = getattr(torch, dtype)
    pipe: Pipeline = CogVideoXPipeline.from_pretrained(model, dtype=precision)
    truth = widened(pipe, reference_dtype(precision))
    errors, own, decibels, largest = [], [], [], 0
    for asked, of_ours, of_baseline in zip(requests, ours, baseline, strict=True):
        expected, first, second = frames(_made(truth, asked, precision)), frames(of_ours), frames(of_baseline)
        errors.append(relative_error(first, expected))
        own.append(relative_error(second, expected))
        decibels.append(psnr(first / 255, second / 255))
        largest = max(largest, int((first - second).abs().max()))
    return Judged(judge(errors, own), judge(own, own), min(decibels), largest)


def _made(pipe: Pipeline, asked: Mapping[str, Any], noise_dtype: torch.dtype) -> bytes:
    """The MP4 of a request, from noise that is rounded as that of the servers is."""
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
    images = pipe(**arguments, latents=latents.to(pipe.transformer.dtype)).frames[0]
    with tempfile.TemporaryDirectory() as folder:
        return write_video(images, Path(folder) / "video.mp4", asked["fps"], repeatable=True).read_bytes()


def frames(mp4: bytes) -> torch.Tensor:
    """`(frames, height, width, 3)` of 0 to 255, float32."""
    import av  # nothing else of the benchmarks needs it

    with av.open(io.BytesIO(mp4), "r") as container:
        found = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(found)).float()
