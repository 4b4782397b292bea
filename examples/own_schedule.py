"""A schedule of your own: find the steps that can be left out of a checkpoint's videos, and leave them out.

    python examples/own_schedule.py         # about two minutes on two CPU cores

Engine "turbo" needs such a schedule of the very checkpoint; only the demo's comes with the package. Here one is found
anew from a few videos of 20 steps. For a checkpoint of yours take more: this is what the command

    cogvx-fast calibrate MODEL --prompts prompts.txt --steps 50 --out schedule.json

does with 24 prompts in the time of 78 videos, on a GPU. See docs/turbo.md.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from cogvx_fast import EngineConfig, FastCogVideoXPipeline, demo_checkpoint
from cogvx_fast.turbo.calibration import Plan, calibrate
from cogvx_fast.video import write_video

PROMPTS = [
    "a red circle moves right on a white background",
    "a blue square stays still on a pink background",
    "a yellow triangle moves up on a black background",
]

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=demo_checkpoint(), help="a checkpoint of your own; a real one needs a GPU")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--guidance", type=float, default=6.0, help="how closely the prompts are followed")
parser.add_argument("--schedule", type=Path, default=Path("out/schedule.json"))
parser.add_argument("--out", default="out/own_schedule.mp4")
args = parser.parse_args()

# Found on two prompts, and checked on a third: how far its videos are from those with all steps.
pipe = FastCogVideoXPipeline.from_pretrained(args.model)
pipe.set_progress_bar_config(disable=True)
calls = [{"prompt": prompt, "seed": number} for number, prompt in enumerate(PROMPTS)]
plan = Plan(calls[:2], calls[2:], steps=args.steps, guidance=args.guidance, disturbed=1, tried=1)
print(f"calibrating: {plan.evaluations} evaluations of the network, where a video has {plan.steps}")
with tempfile.TemporaryDirectory() as parts:
    found = calibrate(pipe, plan, Path(parts))
found.write(args.schedule)
for schedule in found.schedules.values():
    print(schedule.strip, f"{schedule.evaluations} of {args.steps} computed; distance: {schedule.distance}")

# Used: two steps for each evaluation. `recipe="native"` leaves the weights as they are, so nothing else changes.
engine = EngineConfig("turbo", recipe="native", speed=2, schedule=args.schedule)
pipe = FastCogVideoXPipeline.from_pretrained(args.model, engine=engine)
noise = torch.Generator().manual_seed(0)
frames = pipe(PROMPTS[0], num_inference_steps=args.steps, guidance_scale=args.guidance, generator=noise).frames[0]
write_video(frames, args.out, fps=8)
print(pipe.engine_report().line("steps").detail)
print(f"wrote {args.schedule} and {args.out}")
