"""What the quantization recipes do to the demo model's videos: their distance from exact, and what they show.

`python -m tools.demo_model.recipes --work FOLDER` renders the evaluation's prompts with exact and with every recipe
that the machine can run, one batch a file in FOLDER: stop and repeat to resume. `--rows FILE` then adds a row for each.
Without a GPU that multiplies e4m3, recipe fp8 is emulated: rounded as there, summed exactly, which takes six minutes
for ten clips on one core.
"""

from __future__ import annotations

import argparse
import datetime
import random
import uuid
from pathlib import Path

import torch
from cogvx_kernels import ops
from torch import nn

from cogvx_fast import EngineConfig, FastCogVideoXPipeline, demo_checkpoint
from cogvx_fast.bench import results, rows
from cogvx_fast.bench.accuracy import psnr, relative_error_at, ssim
from cogvx_fast.bench.engine import as_plain
from cogvx_fast.bench.provenance import collect
from cogvx_fast.quantization import RECIPES
from cogvx_fast.quantization.recipes import targets, why_unsupported

from .data import HELD_OUT, describe
from .reading import read

EXACT, EMULATED = "exact", "fp8 (emulated)"
PROMPTS, STEPS, GUIDANCE, BATCH = 60, 50, 6.0, 10
FLOOR_DB = 30.0  # of PSNR, for `balanced`
MAX_LOST = 0.02  # of each accuracy
FACTORS = ("background", "color", "shape", "motion")


def engine(recipe: str) -> EngineConfig:
    return EngineConfig() if recipe in (EXACT, EMULATED) else EngineConfig(recipe=recipe)


class EmulatedLinear(nn.Linear):
    """What a GPU's product of e4m3 rows gives: 8-bit numbers with a scale for each row, summed exactly."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        numbers, scales = ops.quantize_rows(x.flatten(0, -2), torch.float8_e4m3fn, impl="torch")
        weight = ops.quantize_rows(self.weight, torch.float8_e4m3fn, impl="torch")
        out = ops.scaled_linear(numbers, scales, *weight, self.bias, None, x.dtype, "torch")
        return out.unflatten(0, x.shape[:-1])


def emulate(transformer: nn.Module) -> None:
    """Makes the linears of recipe fp8 what they would be on a GPU that has e4m3."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and RECIPES["fp8"].scheme_of(name) is not None:
            module.__class__ = EmulatedLinear


def render(recipe: str, work: Path, dtype: str, clips: int = PROMPTS) -> list[dict]:
    """All batches: prompts, latents after every step `(steps, clips, ...)`, frames `(clips, frames, 3, h, w)`."""
    rng = random.Random(60)
    prompts = [describe(scene, rng) for scene in HELD_OUT[:clips]]
    batches, pipe = [], None
    for start in range(0, clips, BATCH):
        path = work / f"{recipe}-{dtype}-{start:02}.pt"
        if not path.exists():
            pipe = pipe or _pipeline(recipe, dtype)
            batch = _render(pipe, prompts[start : start + BATCH], start)
            partial = path.with_suffix(".partial")
            torch.save(batch, partial)
            partial.replace(path)
            print(f"{path.name}: {batch['seconds']:.1f} s", flush=True)
        batches.append(torch.load(path))
    return batches


def _pipeline(recipe: str, dtype: str) -> FastCogVideoXPipeline:
    pipe = FastCogVideoXPipeline.from_pretrained(
        demo_checkpoint(), torch_dtype=getattr(torch, dtype), engine=engine(recipe)
    )
    pipe.set_progress_bar_config(disable=True)
    if recipe == EMULATED:
        emulate(pipe.transformer)
    return pipe


def _render(pipe: FastCogVideoXPipeline, prompts: list[str], start: int) -> dict:
    latents = []

    def keep(pipe: object, step: int, timestep: object, values: dict) -> dict:
        latents.append(values["latents"].half())
        return values

    generators = [torch.Generator().manual_seed(start + i) for i in range(len(prompts))]
    frames = pipe(
        prompts,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=generators,
        output_type="pt",
        callback_on_step_end=keep,
    ).frames
    seconds = sum(pipe.stage_seconds.values())
    return {"prompts": prompts, "latents": torch.stack(latents), "frames": frames.float().half(), "seconds": seconds}


def accuracy(batches: list[dict]) -> dict[str, float]:
    """The share of clips that show what their prompt says, by factor."""
    right = dict.fromkeys(FACTORS, 0)
    clips = [clip for batch in batches for clip in batch["frames"].float()]
    for clip, scene in zip(clips, HELD_OUT, strict=False):
        for name, match in read(clip).matches(scene).items():
            right[name] += match
    return {name: count / len(clips) for name, count in right.items()}


def distance(batches: list[dict], exact: list[dict]) -> dict[str, float]:
    """Means over clips: PSNR, SSIM, and the relative error of the latents after some of the steps."""
    pairs = [
        (clip.float(), other.float())
        for batch, reference in zip(batches, exact, strict=True)
        for clip, other in zip(batch["frames"], reference["frames"], strict=True)
    ]
    found = {
        "psnr_db": sum(psnr(*pair) for pair in pairs) / len(pairs),
        "psnr_lowest_db": min(psnr(*pair) for pair in pairs),
        "ssim": sum(ssim(*pair) for pair in pairs) / len(pairs),
    }
    ours, theirs = (torch.cat([batch["latents"].float() for batch in part], dim=1) for part in (batches, exact))
    errors = (ours - theirs).flatten(2).norm(dim=2) / theirs.flatten(2).norm(dim=2)
    for step in (1, 10, 20, 30, 40, 50):
        found[f"latent_error_step_{step}"] = errors[step - 1].mean().item()
    return found


def row(run: str, recipe: str, dtype: str, batches: list[dict], exact: list[dict]) -> rows.Row:
    """The result row; its gate is red if an accuracy is lost, or `balanced` is further from exact than its floor."""
    scores, before = accuracy(batches), accuracy(exact)
    clips = sum(len(batch["frames"]) for batch in batches)
    found = distance(batches, exact)
    lost = [name for name in FACTORS if before[name] - scores[name] > MAX_LOST]
    error, budget = relative_error_at(found["psnr_db"]), relative_error_at(FLOOR_DB)
    green = error <= budget and not lost
    detail = f"PSNR {found['psnr_db']:.1f} dB against exact, {FLOOR_DB:g} asked"
    detail += (
        f"; lost more than {MAX_LOST:.0%} of {', '.join(lost)}" if lost else "; no accuracy lost more than 2 points"
    )
    extras = found | {f"{name}_accuracy": score for name, score in scores.items()}
    extras |= {f"{name}_accuracy_exact": score for name, score in before.items()}
    return rows.Row(
        run=run,
        series="quality",
        workload="demo",
        stage="generation",
        measures=f"{clips} held-out prompts, {STEPS} steps, guidance {GUIDANCE:g}, against engine='exact' in {dtype}",
        shapes={"batch": BATCH, "steps": STEPS, "clips": clips},
        dtype=dtype,
        contender=recipe,
        engine=as_plain(engine(recipe)),
        engine_report=[],
        command=f"python -m tools.demo_model.recipes --work FOLDER --dtype {dtype} --clips {clips} --rows FILE",
        gate="green" if green else "red",
        gate_detail=detail,
        reference=f"cogvx_fast, engine='exact', {dtype}, same seeds",
        error=error,
        own_error=None,
        budget=budget,
        n=clips,
        p20_seconds=None,
        p50_seconds=None,
        p80_seconds=None,
        first_call_seconds=None,
        peak_memory_bytes=None,
        peak_memory_kind="",
        extras=extras,
        expected_gain=None,
        expected_why=None,
        provenance=collect("cpu"),
        time=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
    )


def _batches(text: str) -> int:
    if not text.isdecimal() or int(text) % BATCH or not 0 < int(text) <= PROMPTS:
        raise argparse.ArgumentTypeError(f"{text!r} must be a multiple of {BATCH} up to {PROMPTS}")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model.recipes", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for the videos of every batch")
    choices = (*RECIPES, EMULATED)
    parser.add_argument("--recipe", choices=choices, action="append", help="again for another; all without it")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--clips", type=_batches, default=PROMPTS, help=f"in tens, up to {PROMPTS}")
    parser.add_argument("--rows", type=Path, help="JSONL file that the result rows are added to")
    arguments = parser.parse_args()
    possible = [name for name, recipe in RECIPES.items() if why_unsupported(recipe, targets()[0]) is None]
    possible += [] if "fp8" in possible else [EMULATED]
    arguments.work.mkdir(parents=True, exist_ok=True)
    exact, run = render(EXACT, arguments.work, arguments.dtype, arguments.clips), uuid.uuid4().hex[:12]
    for recipe in arguments.recipe or possible:
        batches = render(recipe, arguments.work, arguments.dtype, arguments.clips)
        result = row(run, recipe, arguments.dtype, batches, exact)
        print(recipe, result.gate, result.gate_detail, result.extras, flush=True)
        if arguments.rows is not None:
            results.append(arguments.rows, result)


if __name__ == "__main__":
    main()
