"""Calls a function in a Python process of its own, `python -m cogvx_fast.bench.fresh_process MODULE:FUNCTION ORDER`.

A cold start is one such call. This file imports no more than that needs, as importing is a part of what is timed.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_FRAMES = "frames"


def call(function: str, order: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Any:
    """What `function`, "package.module:name", makes of `order` in a fresh process; both go through JSON.

    Args:
        environment: variables of that process on top of those of this one.

    Raises:
        RuntimeError: if that process fails, with the last line that it wrote.
    """
    command = [sys.executable, "-m", "cogvx_fast.bench.fresh_process", function, json.dumps(order)]
    variables = {**os.environ, **(environment or {})}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the fresh process failed: {last}")
    return json.loads(result.stdout.splitlines()[-1])


def cold_start(order: Mapping[str, Any]) -> torch.Tensor:
    """Start Python, import, load, generate, write the frames; returns them.

    Args:
        order: `checkpoint`, `dtype`, `device`, `engine` (fields of an `EngineConfig`, or None for diffusers' own
            pipeline), `tf32_convolutions` (whether cuDNN may round the factors of float32's), and `arguments` of the
            call; `noise` names the seed of its latents and their shape.

    Raises:
        RuntimeError: if that process fails, with the last line that it wrote, or if it ran elsewhere than it was told.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "frames.safetensors"
        used = call("cogvx_fast.bench.fresh_process:generate", {**order, "out": str(path)})
        elsewhere = {part: device for part, device in used.items() if device != order["device"]}
        if elsewhere:
            parts = ", ".join(f"{part} on {device}" for part, device in elsewhere.items())
            raise RuntimeError(f"the fresh process was told to run on {order['device']} and ran {parts}")
        return load_file(path)[_FRAMES]


def generate(order: Mapping[str, Any]) -> dict[str, str]:
    """Make the generation of `cold_start`'s order and write its frames into the file `out`.

    Returns:
        The device of each model's weights, as torch names it.
    """
    import torch
    from safetensors.torch import save_file

    # Of the process, so that a reference here is no better and no worse than one where the order came from.
    torch.backends.cudnn.allow_tf32 = order["tf32_convolutions"]
    dtype = getattr(torch, order["dtype"])
    pipe: Any
    if order["engine"] is None:
        from diffusers import CogVideoXPipeline

        pipe = CogVideoXPipeline.from_pretrained(order["checkpoint"], dtype=dtype)
    else:
        from cogvx_fast import EngineConfig, FastCogVideoXPipeline

        config = EngineConfig(**order["engine"])
        pipe = FastCogVideoXPipeline.from_pretrained(order["checkpoint"], dtype=dtype, engine=config)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(order["device"])
    generator = torch.Generator().manual_seed(order["noise"]["seed"])
    noise = torch.randn(order["noise"]["shape"], generator=generator, dtype=torch.float32, device="cpu")
    latents = noise.to(getattr(torch, order["noise"]["dtype"])).to(dtype)
    frames = pipe(**order["arguments"], latents=latents, output_type="pt").frames
    save_file({_FRAMES: frames.contiguous().cpu()}, order["out"])
    return {name: str(part.device) for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def _main() -> None:
    function, order = sys.argv[1:]
    module, name = function.split(":")
    print(json.dumps(getattr(importlib.import_module(module), name)(json.loads(order))))


if __name__ == "__main__":
    _main()
