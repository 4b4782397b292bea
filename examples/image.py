"""Image to video: a picture becomes the first frame.

    python examples/image.py picture.jpg "waves roll onto the beach, a gull flies past"

It runs CogVideoX-5b-I2V, which it downloads the first time (21 GB). That needs a GPU; on a CPU a video takes hours.
`--model` takes another image-to-video checkpoint: a folder, or an id of the Hub such as THUDM/CogVideoX1.5-5B-I2V.
"""

import argparse

import torch
from diffusers.utils import load_image

from cogvx_fast import FastCogVideoXImageToVideoPipeline
from cogvx_fast.video import write_video

parser = argparse.ArgumentParser()
parser.add_argument("image", help="the first frame; it is stretched to the size of the video")
parser.add_argument("prompt", help="what happens then")
parser.add_argument("--model", default="THUDM/CogVideoX-5b-I2V")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--out", default="out/image.mp4")
args = parser.parse_args()

image = load_image(args.image)  # also turns it as its camera says

pipe = FastCogVideoXImageToVideoPipeline.from_pretrained(args.model)
if torch.cuda.is_available():
    pipe.to("cuda")  # on a card of 16 GB: engine=EngineConfig(memory_limit="14GiB"), see memory_limit.py

frames = pipe(
    prompt=args.prompt,
    image=image,
    num_frames=pipe.transformer.config.sample_frames,  # what the checkpoint was trained on: 49, or 81 for 1.5
    num_inference_steps=args.steps,
    guidance_scale=6,
    generator=torch.Generator().manual_seed(0),
).frames[0]
write_video(frames, args.out, fps=8)  # 16 for CogVideoX 1.5
print(f"wrote {args.out}: {len(frames)} frames of {frames[0].width}x{frames[0].height}")
