"""Text to video: a sentence in, a video out.

    python examples/text.py
    python examples/text.py "a blue star moves up on a gray background" --out out/star.mp4

It runs the demo model, which knows coloured shapes on plain backgrounds, in seconds on a CPU.
"""

import argparse

import torch

from cogvx_fast import FastCogVideoXPipeline, demo_checkpoint
from cogvx_fast.video import write_video

parser = argparse.ArgumentParser()
parser.add_argument("prompt", nargs="?", default="a red circle moves right on a white background")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--out", default="out/text.mp4", help="an .mp4, .gif or .webp, or a folder for PNG frames")
args = parser.parse_args()

# For a real checkpoint change this line. It needs a GPU (hours on a CPU), and downloads 13 GB the first time:
#   pipe = FastCogVideoXPipeline.from_pretrained("THUDM/CogVideoX-2b", dtype=torch.float16).to("cuda")
pipe = FastCogVideoXPipeline.from_pretrained(demo_checkpoint())

frames = pipe(
    args.prompt,
    num_inference_steps=args.steps,
    generator=torch.Generator().manual_seed(0),  # the same noise every time, so the same video
).frames[0]
write_video(frames, args.out, fps=8)

print(pipe.engine_report())  # what was done to make it fast
print(f"wrote {args.out}: {len(frames)} frames of {frames[0].width}x{frames[0].height}")
