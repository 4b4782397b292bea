"""Does the picture show what the prompt says, and how well? Renders unseen prompts with diffusers' own pipeline."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import torch
from diffusers import CogVideoXPipeline
from PIL import Image

from .data import FPS, HELD_OUT, describe
from .measuring import Drawing, measure
from .reading import read
from .vae import psnr

BATCH = 10


def evaluate(checkpoint: Path, num_prompts: int = 60, num_steps: int = 50, sheet: Path | None = None) -> dict:
    """Share of right readings over `num_prompts` combinations that no training stage saw, how well they are drawn, and
    the VAE's PSNR.

    Sentences and noise come from fixed seeds. `sheet`: a PNG of five frames of the first twelve clips.
    """
    pipe = CogVideoXPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    rng = random.Random(60)
    scenes = list(HELD_OUT[:num_prompts])
    prompts = [describe(scene, rng) for scene in scenes]
    right = dict.fromkeys(("background", "color", "shape", "motion"), 0)
    wrong, rows, drawings = [], [], []
    for start in range(0, len(scenes), BATCH):
        chosen = prompts[start : start + BATCH]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(chosen))]
        clips = pipe(
            chosen, num_inference_steps=num_steps, guidance_scale=6.0, generator=generators, output_type="pt"
        ).frames
        for clip, scene, prompt in zip(clips, scenes[start : start + BATCH], chosen, strict=True):
            reading = read(clip)
            matches = reading.matches(scene)
            for name, match in matches.items():
                right[name] += match
            if not all(matches.values()):
                wrong.append(f"{prompt!r} reads as {reading}")
            some = clip[:: (len(clip) - 1) // 4]
            rows.append(torch.cat(list(some), dim=2))
            drawings.append(measure(some, scene))
        done = start + len(chosen)
        print(f"evaluated {done}/{len(scenes)}: " + ", ".join(f"{k} {v}/{done}" for k, v in right.items()), flush=True)
    if sheet is not None:
        columns = [torch.cat(rows[i : i + 6], dim=1) for i in range(0, min(12, len(rows)), 6)]
        picture = (torch.cat(columns, dim=2).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(picture).save(sheet)
    scores = {name: count / len(scenes) for name, count in right.items()}
    return {
        "weights_sha256": digests(checkpoint),
        "prompts": len(scenes),
        "steps": num_steps,
        "guidance_scale": 6.0,
        "fps": FPS,
        **{f"{name}_accuracy": round(score, 4) for name, score in scores.items()},
        **drawn(drawings),
        "vae_psnr_db": round(psnr(pipe.vae), 2),
        "wrong": wrong,
    }


def drawn(drawings: list[Drawing]) -> dict[str, float]:
    """Of all clips: overlap on average and of the worst frame, and the other measures on average and of the worst."""
    found = {"overlap": sum(one.overlap for one in drawings) / len(drawings)}
    found["overlap_worst"] = min(one.least_overlap for one in drawings)
    for name in ("ground_spread", "area_spread"):
        values = [getattr(one, name) for one in drawings]
        found |= {name: sum(values) / len(values), f"{name}_worst": max(values)}
    return {name: round(value, 4) for name, value in found.items()}


def digests(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every weight file: which checkpoint the scores are of."""
    files = sorted(checkpoint.rglob("*.safetensors"))
    return {file.relative_to(checkpoint).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def main(checkpoint: str, report: str | None = None) -> None:
    scores = evaluate(Path(checkpoint), sheet=Path(report).with_suffix(".png") if report else None)
    text = json.dumps(scores, indent=2)
    print(text)
    if report:
        Path(report).write_text(text + "\n")
