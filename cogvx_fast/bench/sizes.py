"""The series of sizes: what each recipe takes on disk and in memory of a fresh process, beside what was predicted."""

from __future__ import annotations

import dataclasses
import gc
import json
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.description import CLASSES
from .comparison import EXACT
from .provenance import collect
from .rows import Row
from .series import Plan, Series, Sink, Tell, markdown_table, size
from .workloads import Workload

_WRITTEN = {"transformer": "diffusers", "text_encoder": "transformers"}  # parts, and of whom their classes are
BUDGET = 0.1  # of the prediction
_STAGE = "load-and-step"
_MEASURES = (
    "a fresh process loads the transformer, reads all of it and runs the first two steps of a session; resident memory "
    "over what it held before, when a model of one head and one layer had gone the same way. With "
    "MALLOC_MMAP_THRESHOLD_=1048576, so that glibc gives back what is freed; running_peak_keeping_bytes: a process "
    "without it, where glibc keeps what is freed"
)
# glibc raises this limit, above which freed memory is given back at once, as it goes; a fixed one stays.
_GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
_COLUMNS = (
    "contender",
    "on disk",
    "loading: peak (predicted)",
    "running: peak (predicted)",
    "off",
    "glibc's own way",
)


class Sizes(Series):
    """Bytes on disk and in memory for exact and for each recipe; the gate is how far the prediction is off."""

    name = label = "sizes"
    has_plot = False  # the table says it

    @classmethod
    def check_workload(cls, workload: Workload, device: str) -> None:
        super().check_workload(workload, device)
        if workload.transformer is None or workload.layers_of is None:
            raise ValueError("--sizes needs one with a transformer of real layer sizes, such as dit-2b")
        if device != "cpu":
            raise ValueError(f"--sizes counts what a process has resident: it needs --device cpu, not {device}")

    @classmethod
    def run(cls, plan: Plan, sink: Sink = lambda row: None, tell: Tell = lambda text: None) -> list[Row]:
        """A row for exact and for each recipe that this CPU can run; all models are on disk for the while.

        Raises:
            ValueError: for what cannot be measured, before any work.
            RuntimeError: if a process fails.
        """
        import torch

        from . import engine
        from .reference import shapes

        cls.check_workload(plan.workload, plan.device)
        dtype, provenance, run, made = getattr(torch, plan.dtype), collect("cpu"), uuid.uuid4().hex[:12], []
        with tempfile.TemporaryDirectory() as root:
            tell("writing the models")
            large, small = Path(root) / "large", Path(root) / "small"
            pipe = _write(plan.workload, dtype, large)
            _write(_smallest(plan.workload), dtype, small)
            model = shapes(plan.workload, pipe)
            del pipe
            gc.collect()
            for recipe in (None, *engine.recipes_on_a_cpu(dtype)):
                name = EXACT if recipe is None else f"{EXACT}-{recipe}"
                if plan.contenders is not None and name not in plan.contenders:
                    continue
                tell(name)
                folder = engine.quantized_checkpoint(large, recipe)
                order = {
                    "workload": dataclasses.asdict(plan.workload),
                    "dtype": plan.dtype,
                    "recipe": recipe,
                    "folder": str(folder),
                    "small": str(engine.quantized_checkpoint(small, recipe)),
                }
                extras = _measured(order) | engine.predicted_bytes(
                    plan.workload.transformer or {}, model, dtype, recipe
                )
                error = abs(extras["running_peak_bytes"] / extras["running_predicted_bytes"] - 1)
                row = Row(
                    run=run,
                    series=cls.name,
                    workload=plan.workload.name,
                    stage=_STAGE,
                    measures=_MEASURES,
                    shapes=model,
                    dtype=plan.dtype,
                    contender=name,
                    engine=engine.as_plain(engine.with_recipe(recipe)),
                    command=plan.command,
                    gate="green" if error <= BUDGET else "red",
                    gate_detail=f"peak while running {error:.1%} off its prediction, {BUDGET:.0%} allowed",
                    reference="the prediction from shapes",
                    error=error,
                    budget=BUDGET,
                    n=1,
                    extras=extras,
                    provenance=provenance,
                )
                sink(row)
                made.append(row)
        return made

    @classmethod
    def line(cls, row: Row) -> str:
        return f"{row.extras['running_peak_bytes'] / 1e6:,.1f} MB while running, {row.gate_detail}"

    def table(self, others: Sequence[Series] = ()) -> str:
        lines = []
        for row in self.rows:
            found = {name.removesuffix("_bytes"): size(value) for name, value in row.extras.items()}
            lines.append(
                [
                    row.contender,
                    found["disk"],
                    f"{found['loading_peak']} ({found['loading_predicted']})",
                    f"{found['running_peak']} ({found['running_predicted']})",
                    f"{row.extras['running_peak_bytes'] / row.extras['running_predicted_bytes'] - 1:+.1%}",
                    found["running_peak_keeping"],
                ]
            )
        return markdown_table(_COLUMNS, lines)


def _smallest(workload: Workload) -> Workload:
    model = {**(workload.transformer or {}), "num_attention_heads": 1, "num_layers": 1}
    return dataclasses.replace(workload, transformer=model)


def _write(workload: Workload, dtype: Any, folder: Path) -> Any:
    """Save the workload's pipeline as a checkpoint, with a text encoder that is there for quantizing to find."""
    import torch
    from transformers import T5Config, T5EncoderModel

    from .reference import build_pipeline

    pipe = build_pipeline(workload, dtype, torch.device("cpu"))
    pipe.transformer.save_pretrained(folder / "transformer")
    T5EncoderModel(T5Config(vocab_size=8, d_model=64, d_kv=64, d_ff=64, num_layers=1, num_heads=1)).save_pretrained(
        folder / "text_encoder"
    )
    index: dict[str, Any] = {"_class_name": "CogVideoXPipeline", **{part: [None, None] for part in CLASSES}}
    index |= {part: [library, CLASSES[part][0]] for part, library in _WRITTEN.items()}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return pipe


def _measured(order: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of the checkpoint on disk, and the peaks of the processes that load it and run a step."""
    from .fresh_process import call

    function = f"{__name__}:load_and_step"
    disk = sum(path.stat().st_size for path in (Path(order["folder"]) / "transformer").glob("*.safetensors"))
    found = {"disk_bytes": disk, **call(function, order, _GIVES_BACK)}
    return found | {"running_peak_keeping_bytes": call(function, order)["running_peak_bytes"]}


def load_and_step(order: Mapping[str, Any]) -> dict[str, int]:
    """In the fresh process: peaks of loading and of running, over what was held before."""
    import torch

    from ..machine import return_freed_memory
    from .measurement import peak_resident, reset_peak, resident

    workload, recipe, dtype = Workload(**order["workload"]), order["recipe"], getattr(torch, order["dtype"])
    # What loading and running import, compile and keep, they import, compile and keep now.
    _step(_load(Path(order["small"]), recipe, dtype), _smallest(workload), dtype)
    return_freed_memory()
    before = resident()
    reset_peak()
    pipe = _load(Path(order["folder"]), recipe, dtype)
    loading = peak_resident()
    reset_peak()
    _step(pipe, workload, dtype)
    return {"loading_peak_bytes": loading - before, "running_peak_bytes": peak_resident() - before}


def _load(folder: Path, recipe: str | None, dtype: Any) -> Any:
    from diffusers import CogVideoXPipeline

    from ..pipelines import accelerate
    from .engine import read_transformer, with_recipe
    from .reference import scheduler

    pipe: Any = CogVideoXPipeline(None, None, None, read_transformer(folder, recipe, dtype), scheduler())
    return accelerate(pipe, with_recipe(recipe))


def _step(pipe: Any, workload: Workload, dtype: Any) -> None:
    import torch

    from .reference import STAGES

    call = STAGES["dit-step"].make(pipe, workload, dtype)
    with torch.no_grad(), pipe.engine_session():
        call(0)
        call(1)
