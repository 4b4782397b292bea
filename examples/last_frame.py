"""First and last frame: a video that goes from one picture to another.

    python examples/last_frame.py morning.jpg evening.jpg "the sun wanders over the harbour, time lapse"

It runs a CogVideoX-Fun InP checkpoint, which it downloads the first time (21 GB). That needs a GPU; on a CPU a video
takes hours. `--model` takes another InP checkpoint: a folder in diffusers' format, or an id of the Hub.
"""

import argparse

import torch
from diffusers.utils import load_image

from cogvx_fast import FastCogVideoXFunInpaintPipeline
from cogvx_fast.video import write_video

parser = argparse.ArgumentParser()
parser.add_argument("first", help="the first frame; both are stretched to the size of the video")
parser.add_argument("last", help="the last frame")
parser.add_argument("prompt", help="what happens between them")
parser.add_argument("--model", default="alibaba-pai/CogVideoX-Fun-V1.1-5b-InP")
parser.add_argument("--height", type=int, default=384, help="these checkpoints were trained on many sizes")
parser.add_argument("--width", type=int, default=672)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--out", default="out/last_frame.mp4")
args = parser.parse_args()

first, last = load_image(args.first), load_image(args.last)

pipe = FastCogVideoXFunInpaintPipeline.from_pretrained(args.model)
if torch.cuda.is_available():
    pipe.to("cuda")

frames = pipe(
    args.prompt,
    image=first,
    last_image=last,  # leave it out to begin with a picture only; leave both out for text alone
    height=args.height,
    width=args.width,
    num_inference_steps=args.steps,
    guidance_scale=6,
    generator=torch.Generator().manual_seed(0),
).frames[0]
write_video(frames, args.out, fps=8)
print(f"wrote {args.out}: {len(frames)} frames of {frames[0].width}x{frames[0].height}")
