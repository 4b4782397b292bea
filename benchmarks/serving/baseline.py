"""What one writes by hand: diffusers' own pipeline, eager, behind a route and one lock.

    python benchmarks/serving/baseline.py MODEL DTYPE DEVICE PORT

`cogvx-fast bench serve --baseline benchmarks/serving/baseline.py` starts it and drives it beside `cogvx-fast serve`. It
writes its videos as that does, so that frames can be compared.
"""

import sys
import tempfile
import threading
from pathlib import Path

import torch
import uvicorn
from diffusers import CogVideoXPipeline
from fastapi import FastAPI, Response
from pydantic import BaseModel

from cogvx_fast.video import write_video

model, dtype, device, port = sys.argv[1:]
pipe = CogVideoXPipeline.from_pretrained(model, dtype=getattr(torch, dtype)).to(device)
pipe.set_progress_bar_config(disable=True)
app, lock = FastAPI(), threading.Lock()


class Asked(BaseModel):
    prompt: str
    seed: int
    width: int
    height: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    fps: int = 8


@app.post("/videos")
def make(asked: Asked) -> Response:
    arguments = asked.model_dump(exclude={"seed", "fps"})
    with lock:
        frames = pipe(**arguments, generator=torch.Generator().manual_seed(asked.seed)).frames[0]
        with tempfile.TemporaryDirectory() as folder:
            path = write_video(frames, Path(folder) / "video.mp4", asked.fps, repeatable=True)
            return Response(path.read_bytes(), media_type="video/mp4")


uvicorn.run(app, port=int(port), log_level="warning")
