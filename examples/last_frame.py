"""First and last frame: a video that goes from one picture to another.

    python examples/last_frame.py
    python examples/last_frame.py morning.jpg evening.jpg "the sun wanders over the harbour, time lapse" \
        --model alibaba-pai/CogVideoX-Fun-V1.1-5b-InP --height 384 --width 672

Without pictures it draws two for the demo model that comes with the package, which takes seconds on a CPU. Another
InP checkpoint of CogVideoX-Fun is a folder in diffusers' format or an id of the Hub (21 GB); that needs a GPU.
"""

import argparse

import torch
from diffusers.utils import load_image
from PIL import Image, ImageDraw

from cogvx_fast import FastCogVideoXFunInpaintPipeline, demo_checkpoint
from cogvx_fast.video import write_video

parser = argparse.ArgumentParser()
parser.add_argument("first", nargs="?", help="the first frame; both are stretched to the size of the video")
parser.add_argument("last", nargs="?", help="the last frame")
parser.add_argument("prompt", nargs="?", default="a red circle moves right on a white background")
parser.add_argument("--model", help="a folder or an id of the Hub; without it the demo")
parser.add_argument("--height", type=int, help="these checkpoints were trained on many sizes")
parser.add_argument("--width", type=int)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--out", default="out/last_frame.mp4")
args = parser.parse_args()


def disc(x: float) -> Image.Image:
    """A red disc on white, its middle at `x` of the width."""
    picture = Image.new("RGB", (512, 512), (245, 245, 245))
    ImageDraw.Draw(picture).circle((x * 512, 256), 112, fill=(220, 40, 40))
    return picture


if args.last is None:
    first, last = disc(0.35), disc(0.65)
else:
    first, last = load_image(args.first), load_image(args.last)

pipe = FastCogVideoXFunInpaintPipeline.from_pretrained(args.model or demo_checkpoint("inpaint"))
if torch.cuda.is_available():
    pipe.to("cuda")

frames = pipe(
    args.prompt,
    image=first,
    last_image=last,  # leave it out to begin with a picture only; leave both out for text alone
    height=args.height,  # without the two the size that the checkpoint was trained at
    width=args.width,
    num_inference_steps=args.steps,
    generator=torch.Generator().manual_seed(0),
).frames[0]
write_video(frames, args.out, fps=8)
print(f"wrote {args.out}: {len(frames)} frames of {frames[0].width}x{frames[0].height}")
