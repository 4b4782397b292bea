"""`python -m benchmarks.quality.composition`: do the distances of a recipe and of turbo add up?

Videos of the demo checkpoint with each recipe, all steps computed, and with turbo on it, against exact with all steps.
If both errors were independent their squares would add up: the last column says what distance that would be.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch

from cogvx_fast import EngineConfig, FastCogVideoXPipeline, demo_checkpoint
from tools.demo_model.recipes import EMULATED, emulate

from . import prompts

STEPS = 50
RECIPES = {"exact": "native", "int8": "int8", EMULATED: "native"}


def made(recipe: str, evaluations: int | None, clips: int, dtype: torch.dtype) -> torch.Tensor:
    """Frames of the first clips, `(clips, frames, 3, height, width)` in [0, 1]."""
    speed: dict[str, Any] = {"tier": "balanced"}
    if evaluations is not None:
        speed = {"tier": "turbo", "speed": STEPS / evaluations}
    pipe: Any = FastCogVideoXPipeline.from_pretrained(
        demo_checkpoint(), dtype=dtype, engine=EngineConfig(recipe=RECIPES[recipe], **speed)
    )
    pipe.set_progress_bar_config(disable=True)
    if recipe == EMULATED:
        emulate(pipe.transformer)
    generators = [torch.Generator().manual_seed(number) for number in range(clips)]
    texts = list(prompts.chosen(None, True).first(clips).texts)
    return pipe(texts, num_inference_steps=STEPS, generator=generators, output_type="pt").frames.float()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.composition", description=__doc__)
    parser.add_argument("--evaluations", type=int, default=17)
    parser.add_argument("--clips", type=int, default=10)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    asked = parser.parse_args()
    dtype = getattr(torch, asked.dtype)

    def error(recipe: str, evaluations: int | None) -> torch.Tensor:
        frames = made(recipe, evaluations, asked.clips, dtype)
        return (frames - reference).double().square().flatten(1).mean(dim=1).clamp(min=1e-10)

    def decibels(value: torch.Tensor) -> str:
        found = -10 * value.log10()
        return f"{found.mean():.1f} ({found.min():.1f})"

    reference = made("exact", None, asked.clips, dtype)
    turbo = error("exact", asked.evaluations)
    print(f"| recipe | all steps | turbo, {asked.evaluations} evaluations | if independent |")
    print("|---|---|---|---|")
    print(f"| exact | {math.inf} | {decibels(turbo)} | |", flush=True)
    for recipe in list(RECIPES)[1:]:
        alone, both = error(recipe, None), error(recipe, asked.evaluations)
        print(f"| {recipe} | {decibels(alone)} | {decibels(both)} | {decibels(alone + turbo)} |", flush=True)


if __name__ == "__main__":
    main()
