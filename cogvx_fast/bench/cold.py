"""A generation in a process of its own, `python -m cogvx_fast.bench.cold`; the stage `cold-start` is its call."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FRAMES = "frames"


def in_a_fresh_process(order: dict[str, Any]) -> Any:
    """Start Python, import, load, generate, write the frames; returns them.

    Args:
        order: `checkpoint`, `dtype`, `engine` (fields of an `EngineConfig`, or None for diffusers' own pipeline), and
            `arguments` of the call; `noise` names the seed of its latents and their shape.

    Raises:
        RuntimeError: if that process fails, with the last line that it wrote.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "frames.safetensors"
        command = [sys.executable, "-m", __name__, "--order", json.dumps(order), "--out", str(path)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            last = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"the fresh process failed: {last}")
        return load_file(path)[FRAMES]


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--order", required=True)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    order = json.loads(options.order)

    import torch
    from safetensors.torch import save_file

    dtype = getattr(torch, order["dtype"])
    if order["engine"] is None:
        from diffusers import CogVideoXPipeline

        pipe = CogVideoXPipeline.from_pretrained(order["checkpoint"], dtype=dtype)
    else:
        from cogvx_fast import EngineConfig, FastCogVideoXPipeline

        config = EngineConfig(**order["engine"])
        pipe = FastCogVideoXPipeline.from_pretrained(order["checkpoint"], dtype=dtype, engine=config)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(order["noise"]["shape"], generator=torch.Generator().manual_seed(order["noise"]["seed"]))
    latents = noise.to(getattr(torch, order["noise"]["dtype"])).to(dtype)
    frames = pipe(**order["arguments"], latents=latents, output_type="pt").frames
    save_file({FRAMES: frames.contiguous()}, options.out)


if __name__ == "__main__":
    _main()
