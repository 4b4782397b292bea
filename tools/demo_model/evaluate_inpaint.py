"""Do the videos of the second demo begin and end with the pictures that it is told, and show what the prompt says?

By the pipeline for these checkpoints in plain torch. Prompts in turn are told the first frame, the last, both, nothing.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cogvx_fast.fun import CogVideoXFunInpaintPipeline

from .data import HELD_OUT, describe, render
from .evaluate import digests
from .reading import read

CASES = ("first", "last", "both", "none")
FACTORS = ("background", "color", "shape", "motion")


def evaluate(checkpoint: Path, num_prompts: int = 60, num_steps: int = 50, sheet: Path | None = None) -> dict:
    """By case: the share of right readings of each factor, and the PSNR of the frames that were given, in dB.

    Sentences, clips that the pictures are taken of, and noise come from fixed seeds. `sheet`: a PNG of five frames of
    the first twelve clips; pictures that were given stand left and right of them.
    """
    pipe = CogVideoXFunInpaintPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    size = pipe.transformer.config.sample_height * 8
    rng = random.Random(61)
    right = {case: dict.fromkeys(FACTORS, 0) for case in CASES}
    kept: dict[str, list[float]] = {case: [] for case in CASES}
    clips, rows, wrong = dict.fromkeys(CASES, 0), [], []
    for index, scene in enumerate(HELD_OUT[:num_prompts]):
        case, prompt = CASES[index % len(CASES)], describe(scene, rng)
        ideal = (render(scene, random.Random(f"told {index}"), size=size, jitter=0.4).transpose(0, 1) + 1) / 2
        first, last = (ideal[0] if case in ("first", "both") else None, ideal[-1] if case in ("last", "both") else None)
        pictures = {"image": first, "last_image": last}
        clip = pipe(
            prompt,
            **{name: as_picture(frame) for name, frame in pictures.items() if frame is not None},
            num_inference_steps=num_steps,
            guidance_scale=6.0,
            generator=torch.Generator().manual_seed(index),
            output_type="pt",
        ).frames[0]
        reading = read(clip)
        matches = reading.matches(scene)
        clips[case] += 1
        for name, match in matches.items():
            right[case][name] += match
        if not all(matches.values()):
            wrong.append(f"{case}: {prompt!r} reads as {reading}")
        kept[case] += [psnr(clip[at], frame) for at, frame in ((0, first), (-1, last)) if frame is not None]
        blank = torch.full_like(clip[0], 0.5)
        rows.append(torch.cat([first if first is not None else blank, *clip[:: (len(clip) - 1) // 4],
                               last if last is not None else blank], dim=2))  # fmt: skip
        if (index + 1) % 10 == 0:
            print(f"evaluated {index + 1}/{num_prompts}", flush=True)
    if sheet is not None:
        columns = [torch.cat(rows[i : i + 6], dim=1) for i in range(0, min(12, len(rows)), 6)]
        as_picture(torch.cat(columns, dim=2)).save(sheet)
    return {
        "weights_sha256": digests(checkpoint),
        "prompts": num_prompts,
        "steps": num_steps,
        "guidance_scale": 6.0,
        **{
            case: {f"{name}_accuracy": round(count / clips[case], 4) for name, count in right[case].items()}
            | ({"given_psnr_db": mean(kept[case]), "given_psnr_worst_db": min(kept[case])} if kept[case] else {})
            for case in CASES
        },
        "wrong": wrong,
    }


def as_picture(frame: torch.Tensor) -> Image.Image:
    """Of `(3, height, width)` in [0, 1]."""
    return Image.fromarray((frame.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy().astype(np.uint8))


def psnr(frame: torch.Tensor, given: torch.Tensor) -> float:
    """In dB, of values in [0, 1]."""
    return round(-10 * (frame.clamp(0, 1) - given).square().mean().log10().item(), 2)


def mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 2)


def main(checkpoint: str, report: str) -> None:
    scores = evaluate(Path(checkpoint), sheet=Path(report).with_suffix(".png"))
    text = json.dumps(scores, indent=2)
    print(text)
    Path(report).write_text(text + "\n")
