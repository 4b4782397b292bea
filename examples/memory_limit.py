"""A memory limit: say what a generation may take, and the most exact way that fits is chosen.

    python examples/memory_limit.py
    python examples/memory_limit.py --limits 8GiB 4GiB --model MODEL

Nothing has to be tried out: what a generation takes follows from the sizes of its tensors. Of the demo model a limit is
some megabytes; of CogVideoX-2b on a card of 8 GB it is "7GiB", which leaves room for what CUDA itself needs.
"""

import argparse

import torch

from cogvx_fast import EngineConfig, FastCogVideoXPipeline, demo_checkpoint
from cogvx_fast.video import write_video

parser = argparse.ArgumentParser()
parser.add_argument("--limits", nargs="+", default=["1GiB", "45MiB", "1MiB"])
parser.add_argument("--model", default=demo_checkpoint(), help='a real one: "THUDM/CogVideoX-2b"; it needs a GPU')
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out", default="out/memory_limit.mp4", help="the video of the smallest limit that is enough")
args = parser.parse_args()

pipe = None
for limit in args.limits:
    try:
        fits = FastCogVideoXPipeline.from_pretrained(args.model, engine=EngineConfig(memory_limit=limit))
    except ValueError as error:  # said before a weight is read, with what would fit
        print(f"\n{limit}: refused: {error}")
        continue
    pipe = fits.to("cuda") if torch.cuda.is_available() else fits  # the GPU may get one model at a time
    print(f"\n{limit}: {pipe.engine_report().line('memory').detail}")

if pipe is None:
    raise SystemExit("no limit was enough")
frames = pipe(
    "a red circle moves right on a white background",
    num_inference_steps=args.steps,
    generator=torch.Generator().manual_seed(0),
).frames[0]
write_video(frames, args.out, fps=8)
print(f"\n{pipe.engine_report()}\nwrote {args.out}")
