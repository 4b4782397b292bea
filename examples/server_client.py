"""A client of the server: order a video, watch it being made, fetch it. With OpenAI's own client, unchanged.

    pip install ".[serve]" openai
    cogvx-fast serve                    # in another terminal: the demo model; with a model's name, that one
    python examples/server_client.py

Against another server: `--url http://HOST:8000/v1`, and `--key` if it wants one.
"""

import argparse
import time
import warnings
from pathlib import Path

from openai import OpenAI

parser = argparse.ArgumentParser()
parser.add_argument("prompt", nargs="?", default="a purple square moves down on a pink background")
parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
parser.add_argument("--key", default="none", help="as `cogvx-fast serve-key` made it")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--out", type=Path, default=Path("out/server_client.mp4"))
args = parser.parse_args()

warnings.filterwarnings("ignore", "The Sora API")  # OpenAI's own service is ending; its client speaks to ours
client = OpenAI(base_url=args.url, api_key=args.key)
video = client.videos.create(
    prompt=args.prompt,
    # What OpenAI's API has no name for; the whole list is at http://127.0.0.1:8000/docs.
    extra_body={"num_inference_steps": args.steps, "seed": 0},
)
print(f"{video.id}: ordered")

# `client.videos.create_and_poll(...)` waits by itself; this shows how far it is.
said = None
while video.status in ("queued", "in_progress"):
    time.sleep(0.5)
    video = client.videos.retrieve(video.id)
    if said != (said := (video.status, video.progress)):
        print(f"{video.id}: {video.status}, {video.progress}%")

if video.status != "completed":
    raise SystemExit(f"{video.id}: {video.error.message}")
args.out.parent.mkdir(parents=True, exist_ok=True)
client.videos.download_content(video.id).write_to_file(args.out)
print(f"wrote {args.out}")
