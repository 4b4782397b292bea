"""Video to video: a video is made anew by another sentence, and keeps its composition and motion.

    python examples/video.py
    python examples/video.py --strength 0.6      # nearer to the first video; 1 keeps nothing of it

The first video is made by the demo model here. Both take seconds on a CPU.
"""

import argparse

import torch

from cogvx_fast import FastCogVideoXPipeline, FastCogVideoXVideoToVideoPipeline, demo_checkpoint
from cogvx_fast.video import write_video

parser = argparse.ArgumentParser()
parser.add_argument("--strength", type=float, default=0.8)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--before", default="out/video_before.mp4", help="where the first video goes")
parser.add_argument("--out", default="out/video.mp4", help="where the second one goes")
args = parser.parse_args()

# For a real checkpoint change this line; it needs a GPU (hours on a CPU):
#   pipe = FastCogVideoXPipeline.from_pretrained("THUDM/CogVideoX-2b", dtype=torch.float16).to("cuda")
pipe = FastCogVideoXPipeline.from_pretrained(demo_checkpoint())
common = {"num_inference_steps": args.steps}

# Instead of this, a file of your own: `diffusers.utils.load_video("in.mp4")` (pip install "imageio[ffmpeg]").
before = pipe(
    "a red circle moves right on a white background", generator=torch.Generator().manual_seed(0), **common
).frames[0]
write_video(before, args.before, fps=8)

remake = FastCogVideoXVideoToVideoPipeline.from_pipe(pipe)  # shares the weights: no second copy in memory
after = remake(
    prompt="a blue circle moves right on a white background",
    video=before,
    strength=args.strength,
    generator=torch.Generator().manual_seed(1),
    **common,
).frames[0]
write_video(after, args.out, fps=8)
print(f"wrote {args.before} and {args.out}: {len(after)} frames of {after[0].width}x{after[0].height}")
