"""What each recipe takes on disk and in memory: a fresh process loads the transformer and runs a step of it.

`python -m cogvx_fast.bench.sizes` is that process.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import json
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..config import EngineConfig
from ..machine import return_freed_memory
from ..quantization import RECIPES
from ..quantization.recipes import Recipe, Target, why_not
from .contenders import as_plain
from .memory import peak_resident, resident
from .models import build_pipeline
from .provenance import collect
from .rows import Row
from .stages import STAGES, shapes
from .workloads import Workload

STAGE = "load-and-step"
BUDGET = 0.1  # of the prediction
MEASURES = (
    "a fresh process loads the transformer, reads all of it and runs the first two steps of a session; resident memory "
    "over what it held before, when a model of one head and one layer had gone the same way. With "
    "MALLOC_MMAP_THRESHOLD_=1048576, so that glibc gives back what is freed; running_peak_keeping_bytes: a process "
    "without it, where glibc keeps what is freed"
)
# glibc raises this limit, above which freed memory is given back at once, as it goes; a fixed one stays.
_GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


def run(
    workload: Workload,
    dtype: str,
    command: str,
    sink: Callable[[Row], None] = lambda row: None,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """A row for exact and for each recipe that a CPU can run; all models are on disk for the while.

    Raises:
        RuntimeError: if a process fails.
    """
    provenance, number, made = collect("cpu"), uuid.uuid4().hex[:12], []
    with tempfile.TemporaryDirectory() as root:
        tell("writing the models")
        large, small = Path(root) / "large", Path(root) / "small"
        pipe = _write(workload, getattr(torch, dtype), large)
        _write(_smallest(workload), getattr(torch, dtype), small)
        size = shapes(workload, pipe)
        del pipe
        gc.collect()
        for recipe in _recipes(getattr(torch, dtype)):
            name = "ours" if recipe is None else f"ours-{recipe.name}"
            tell(name)
            folder = _quantized(large, recipe)
            order = {
                "workload": dataclasses.asdict(workload),
                "dtype": dtype,
                "recipe": None if recipe is None else recipe.name,
                "folder": str(folder),
                "small": str(_quantized(small, recipe)),
            }
            disk = sum(path.stat().st_size for path in (folder / "transformer").glob("*.safetensors"))
            found = {"disk_bytes": disk, **_in_a_fresh_process(order, _GIVES_BACK)}
            found["running_peak_keeping_bytes"] = _in_a_fresh_process(order, {})["running_peak_bytes"]
            predicted = _predicted(workload, getattr(torch, dtype), recipe, size)
            origin = {
                "provenance": provenance,
                "time": datetime.datetime.now(datetime.UTC).isoformat("T", "milliseconds"),
            }
            fields = {"dtype": dtype, "shapes": size, "run": number, "command": command, **origin}
            row = Row(**_row(workload, name, recipe, found | predicted), **fields)
            sink(row)
            made.append(row)
    return made


def _recipes(dtype: torch.dtype) -> Iterator[Recipe | None]:
    yield None
    target = Target.of(torch.device("cpu"))
    yield from (recipe for recipe in RECIPES.values() if why_not(recipe, target, dtype) is None)


def _smallest(workload: Workload) -> Workload:
    model = {**workload.transformer, "num_attention_heads": 1, "num_layers": 1}
    return dataclasses.replace(workload, transformer=model)


def _write(workload: Workload, dtype: torch.dtype, folder: Path) -> Any:
    """Save the workload's pipeline as a checkpoint, with a text encoder that is there for quantizing to find."""
    from transformers import T5Config, T5EncoderModel

    pipe = build_pipeline(workload, dtype, torch.device("cpu"))
    pipe.transformer.save_pretrained(folder / "transformer")
    T5EncoderModel(T5Config(vocab_size=8, d_model=64, d_kv=64, d_ff=64, num_layers=1, num_heads=1)).save_pretrained(
        folder / "text_encoder"
    )
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "CogVideoXPipeline"}), encoding="utf-8")
    return pipe


def _quantized(source: Path, recipe: Recipe | None) -> Path:
    from ..quantization.convert import quantize_checkpoint

    if recipe is None:
        return source
    out = source.with_name(f"{source.name}-{recipe.name}")
    quantize_checkpoint(source, out, recipe.name)
    return out


def _in_a_fresh_process(order: dict[str, Any], environment: dict[str, str]) -> dict[str, int]:
    command = [sys.executable, "-m", __name__, "--order", json.dumps(order)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the fresh process failed: {last}")
    return json.loads(result.stdout.splitlines()[-1])


def _predicted(workload: Workload, dtype: torch.dtype, recipe: Recipe | None, size: dict[str, int]) -> dict[str, int]:
    from ..quantization.memory import Models, transformer_bytes
    from ..transformer.memory import Clip, Way, step_memory

    config = _engine(recipe)
    models = Models.from_configs(workload.transformer, None, None)
    weights = transformer_bytes(models, recipe, dtype)
    clip = Clip(size["text_tokens"], size["video_tokens"], size["batch"], size["steps"], reads_positions=False)
    way = Way.of(torch.device("cpu"), dtype, config, recipe)
    step = step_memory(models.transformer.config, clip, dtype, way, config, mapped=True)
    return {
        "loading_predicted_bytes": weights,
        "running_predicted_bytes": weights + step.total,
        "packed_predicted_bytes": step.packed,
    }


def _engine(recipe: Recipe | None) -> EngineConfig:
    return EngineConfig() if recipe is None else EngineConfig(recipe=recipe.name, text_encoder="native")


def _row(workload: Workload, name: str, recipe: Recipe | None, extras: dict[str, int]) -> dict[str, Any]:
    """The fields of a row but for where it is from."""
    error = abs(extras["running_peak_bytes"] / extras["running_predicted_bytes"] - 1)
    times = ("p20_seconds", "p50_seconds", "p80_seconds", "first_call_seconds", "peak_memory_bytes")
    return {
        "series": "sizes",
        "workload": workload.name,
        "stage": STAGE,
        "measures": MEASURES,
        "contender": name,
        "engine": as_plain(_engine(recipe)),
        "engine_report": [],
        "gate": "green" if error <= BUDGET else "red",
        "gate_detail": f"peak while running {error:.1%} off its prediction, {BUDGET:.0%} allowed",
        "reference": "the prediction from shapes",
        "error": error,
        "own_error": None,
        "budget": BUDGET,
        "n": 1,
        **dict.fromkeys(times),
        "peak_memory_kind": "",
        "extras": extras,
        "expected_gain": None,
        "expected_why": None,
    }


def _measured(order: dict[str, Any]) -> dict[str, int]:
    """In the fresh process: peaks of loading and of running, over what was held before."""
    workload, dtype = Workload(**order["workload"]), getattr(torch, order["dtype"])
    recipe = None if order["recipe"] is None else RECIPES[order["recipe"]]
    # What loading and running import, compile and keep, they import, compile and keep now.
    _step(_load(Path(order["small"]), recipe, dtype), _smallest(workload), dtype)
    return_freed_memory()
    before = resident()
    pipe = []
    loading = peak_resident(lambda: pipe.append(_load(Path(order["folder"]), recipe, dtype)))
    running = peak_resident(lambda: _step(pipe[0], workload, dtype))
    return {"loading_peak_bytes": loading - before, "running_peak_bytes": running - before}


def _load(folder: Path, recipe: Recipe | None, dtype: torch.dtype) -> Any:
    from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel

    from ..pipelines import accelerate
    from ..quantization.checkpoint import load_transformer
    from ..quantization.manifest import read_manifest
    from .models import scheduler

    if recipe is None:
        transformer = CogVideoXTransformer3DModel.from_pretrained(folder / "transformer", dtype=dtype)
    else:
        transformer = load_transformer(folder, read_manifest(folder))
    for parameter in transformer.parameters():
        parts = [parameter] if not hasattr(parameter, "qdata") else [parameter.qdata, parameter.scale]
        for tensor in parts:
            torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())[::4096].sum()  # a byte of every page
    return accelerate(CogVideoXPipeline(None, None, None, transformer, scheduler()), _engine(recipe))


def _step(pipe: Any, workload: Workload, dtype: torch.dtype) -> None:
    call = STAGES["dit-step"].make(pipe, workload, dtype)
    with torch.no_grad(), pipe.engine_session():
        call(0)
        call(1)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--order", required=True)
    print(json.dumps(_measured(json.loads(parser.parse_args().order))))


if __name__ == "__main__":
    _main()
