"""One of the processes of the series of scaling: `torchrun ... -m cogvx_fast.bench.scaling_ranks ORDER`.

The first of them is also the one process that has the whole machine, while the others wait; then all work together.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .. import devices
from ..config import EngineConfig
from ..parallel.degrees import ParallelConfig, choose
from ..parallel.traffic import step_traffic
from ..pipelines import accelerate
from .accuracy import Verdict, judge, reference_dtype, relative_error
from .engine import as_plain, report_lines
from .measurement import Summary
from .reference import STAGES, Pipeline, build_pipeline, shapes, widened
from .scaling import ALONE
from .scaling import STAGES as MEASURED
from .workloads import Workload

PATIENCE = datetime.timedelta(minutes=60)  # of those that wait while the first computes what counts as the truth
_GATE = 1  # inputs that the result is judged on


def ways(processes: int, heads: int) -> list[ParallelConfig]:
    """What is measured: what "auto" takes with guidance, and the rows of the stream alone."""
    found = [choose(processes, heads, guided=True), choose(processes, heads, guided=False)]
    return list(dict.fromkeys(found))


def main() -> None:
    """Measure what the order on the command line says; the first process writes what was found, a line each."""
    order = json.loads(sys.argv[1])
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device(f"cuda:{local}" if order["device"].startswith("cuda") else order["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        with torch.no_grad(), devices.current(device):
            found = list(_Ranks(order, device).measure())
        if dist.get_rank() == 0:
            Path(order["out"]).write_text("".join(json.dumps(row) + "\n" for row in found))
    finally:
        dist.destroy_process_group()


class _Ranks:
    """This process, with diffusers' pipeline and ours on the same weights."""

    def __init__(self, order: dict[str, Any], device: torch.device):
        as_tuples = {name: tuple(order["workload"][name]) for name in ("stages", "dtypes", "prompts")}
        fields = {**order["workload"], **as_tuples}
        self.workload, self.order, self.device = Workload(**fields), order, device
        self.dtype: torch.dtype = getattr(torch, order["dtype"])
        self.pipe = build_pipeline(self.workload, self.dtype, device)
        self.size, self.is_first = dist.get_world_size(), dist.get_rank() == 0
        self.threads_each = max(1, order["threads"] // self.size)

    def measure(self) -> Iterator[dict[str, Any]]:
        heads = self.pipe.transformer.config.num_attention_heads
        for stage in self.workload.stages:
            if stage not in MEASURED:
                continue
            splits = ways(self.size, heads)
            if stage == "vae-decode":  # whose bands do not depend on them
                splits = splits[:1]
            yield from self._of_stage(stage, splits)

    def _of_stage(self, stage: str, splits: list[ParallelConfig]) -> Iterator[dict[str, Any]]:
        configs = {ALONE: EngineConfig()} | {_name(split, stage): EngineConfig(parallel=split) for split in splits}
        pipes = {name: accelerate(self.pipe, engine=config) for name, config in configs.items()}
        workloads = dict.fromkeys(configs, self.workload)
        calls = {}
        for name, pipe in pipes.items():
            if name == ALONE and not self.is_first:
                continue
            self._set_threads(name)
            calls[name] = self._in_session(pipe, stage, self.workload)
        verdicts = self._judged(stage, calls)
        part = self._part() if stage == "vae-decode" else None
        if part is not None:
            apart = f"{self.size} parts apart"
            configs[apart], pipes[apart], workloads[apart] = configs[ALONE], pipes[ALONE], part
            self._set_threads(apart)
            calls[apart] = self._in_session(pipes[apart], stage, part)
            verdicts[apart] = Verdict("none", "not judged: parts of the rows that know nothing of each other")
        times: dict[str, list[float]] = {name: [] for name in configs}
        for number in range(self.order["warmup"] + self.order["runs"]):
            for name in configs:
                elapsed = self._timed(name, calls.get(name), number)
                if number >= self.order["warmup"]:
                    times[name].append(elapsed)
        if self.is_first:
            for name, config in configs.items():
                found = shapes(workloads[name], pipes[name])
                yield self._row(stage, name, config, pipes[name], found, verdicts[name], times[name])

    def _part(self) -> Workload | None:
        """The clip of a process that has its part of the rows and no neighbours; None where they cannot be dealt."""
        rows, rest = divmod(shapes(self.workload, self.pipe)["height"], self.size)
        pixels = 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)  # of a row of latents
        return None if rest or rows % pixels else dataclasses.replace(self.workload, height=rows)

    def _set_threads(self, name: str) -> None:
        torch.set_num_threads(self.order["threads"] if name == ALONE else self.threads_each)

    def _in_session(self, pipe: Pipeline, stage: str, workload: Workload) -> Callable[[int], torch.Tensor]:
        """The stage's call, where it is a part of the loop inside of a session, which stays open."""
        context, stack = contextvars.copy_context(), contextlib.ExitStack()
        if STAGES[stage].in_loop:
            context.run(stack.enter_context, pipe.engine_session(watched=False))
        call = context.run(STAGES[stage].make, pipe, workload, self.dtype)
        return lambda number: context.run(call, number)

    def _judged(self, stage: str, calls: dict[str, Callable[[int], torch.Tensor]]) -> dict[str, Any]:
        """The verdict on each way, by the first process; the others compute their parts."""
        numbers = range(_GATE)
        expected, own = [], []
        if self.is_first:
            torch.set_num_threads(self.order["threads"])
            wide = widened(self.pipe, reference_dtype(self.dtype))
            reference = STAGES[stage].make(wide, self.workload, self.dtype)
            expected = [reference(number).cpu() for number in numbers]
            del wide, reference
            plain = STAGES[stage].make(self.pipe, self.workload, self.dtype)
            own = [relative_error(plain(number).cpu(), expected[number]) for number in numbers]
        dist.barrier()
        verdicts = {}
        for name in calls if self.is_first else [name for name in calls if name != ALONE]:
            self._set_threads(name)
            outputs = [calls[name](number).cpu() for number in numbers]
            if self.is_first:
                errors = [relative_error(outputs[number], expected[number]) for number in numbers]
                verdicts[name] = judge(errors, own)
        return verdicts

    def _timed(self, name: str, call: Callable[[int], torch.Tensor] | None, number: int) -> float:
        """Seconds from when all are ready until all are done; while one works alone the others wait."""
        self._set_threads(name)
        self._ready()
        started = time.perf_counter()
        if call is not None:
            call(number)
        self._ready()
        return time.perf_counter() - started

    def _ready(self) -> None:
        devices.synchronize(self.device)
        dist.barrier()
        devices.synchronize(self.device)

    def _row(
        self,
        stage: str,
        name: str,
        config: EngineConfig,
        pipe: Pipeline,
        found: dict[str, Any],
        verdict: Verdict,
        times: list[float],
    ) -> dict[str, Any]:
        summary, alone = Summary.of(times), name == ALONE
        on_cpu = self.device.type == "cpu"
        extras: dict[str, Any] = {
            "processes": 1 if alone else self.size,
            "threads_each": (self.order["threads"] if alone else self.threads_each) if on_cpu else 0,
        }
        if isinstance(config.parallel, ParallelConfig) and stage != "vae-decode":
            extras["sent_bytes_per_step"] = self._sent(config.parallel)
        speeds = {"p20_seconds": summary.p20, "p50_seconds": summary.p50, "p80_seconds": summary.p80}
        return {
            "stage": stage,
            "measures": f"{STAGES[stage].measures}; from when all processes are ready until all are done",
            "shapes": found,
            "contender": name,
            "engine": as_plain(config),
            "engine_report": report_lines(pipe),
            "gate": verdict.gate,
            "gate_detail": verdict.detail,
            "reference": f"diffusers in {str(reference_dtype(self.dtype)).removeprefix('torch.')}",
            "error": verdict.error,
            "own_error": verdict.own_error,
            "budget": verdict.budget,
            "n": len(times),
            **({} if verdict.gate == "red" else speeds),
            "extras": extras,
        }

    def _sent(self, config: ParallelConfig) -> int:
        found, model = shapes(self.workload, self.pipe), self.pipe.transformer.config
        return step_traffic(
            config,
            rows=found["tokens"],
            text=found["text_tokens"],
            heads=model.num_attention_heads,
            head_dim=model.attention_head_dim,
            layers=model.num_layers,
            numbers_per_token=self.pipe.transformer.proj_out.out_features,
            samples=2,
            itemsize=self.dtype.itemsize,
        ).total


def _name(split: ParallelConfig, stage: str) -> str:
    if stage == "vae-decode":
        return f"{split.vae} bands"
    parts = {"guidance": split.guidance, "ulysses": split.ulysses, "ring": split.ring}
    return ", ".join(f"{name} {number}" for name, number in parts.items() if number > 1)


if __name__ == "__main__":
    main()
