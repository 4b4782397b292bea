"""The series of scaling: one clip made by several processes, beside one process that has the whole machine."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .comparison import COLORS
from .provenance import collect
from .rows import Row, RowError
from .series import Plan, Series, Sink, Tell, markdown_table, seconds, size
from .workloads import Workload

ALONE = "one process"
STAGES = ("dit-step", "vae-decode", "generation")
TARGET = 1.08  # times one process, where all share the same cores


class Scaling(Series):
    """A row for one process, and one for each way to split the work, of one run in which they alternated.

    On GPUs each process has one of its own, and the others should be faster. On a CPU all have the cores that the one
    process has alone, so that whatever is above its time is what splitting costs.
    """

    name = label = "scaling"

    @classmethod
    def check_workload(cls, workload: Workload, device: str) -> None:
        super().check_workload(workload, device)
        if not set(STAGES) & set(workload.stages) or workload.one_call:
            raise ValueError(f"{workload.name} has none of the stages {', '.join(STAGES)}, or takes minutes for each")

    @classmethod
    def check(cls, row: Row) -> None:
        if row.gate != "red" and row.p50_seconds is None:
            raise RowError(f"a row of {cls.name} has times")
        wanted = {"processes", "threads_each"}
        if not wanted <= set(row.extras):
            raise RowError(f"a row of {cls.name} states {' and '.join(sorted(wanted))} in extras")

    @classmethod
    def measure(
        cls, plan: Plan, processes: int, sink: Sink = lambda row: None, tell: Tell = lambda text: None
    ) -> list[Row]:
        """Measure with so many processes, which torchrun starts.

        Raises:
            ValueError: for what cannot be measured, before any work.
            RuntimeError: if a process fails, with what it said last.
        """
        cls.check_workload(plan.workload, plan.device)
        provenance, run, made = collect(plan.device), uuid.uuid4().hex[:12], []
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "found.jsonl"
            order = {
                "workload": dataclasses.asdict(plan.workload),
                "dtype": plan.dtype,
                "device": plan.device,
                "runs": plan.runs,
                "warmup": plan.workload.warmup if plan.warmup is None else plan.warmup,
                "threads": provenance.threads,
                "out": str(out),
            }
            tell(f"{processes} processes")
            words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            command = [sys.executable, *words, "-m", "cogvx_fast.bench.scaling_ranks", json.dumps(order)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                # torch puts its rank before what ends a process; what is said while it ends comes without one.
                said = [line for line in done.stderr.splitlines() if "Error" in line]
                lines = [*(line for line in said if line.startswith("[rank")), *said, "it said nothing"]
                raise RuntimeError(f"the processes failed: {lines[0].strip()}")
            for line in out.read_text().splitlines():
                fields = json.loads(line)
                row = Row(
                    **fields,
                    run=run,
                    series=cls.name,
                    workload=plan.workload.name,
                    dtype=plan.dtype,
                    command=plan.command,
                    provenance=provenance,
                )
                sink(row)
                made.append(row)
        return made

    def table(self, others: Sequence[Series]) -> str:
        """A line for each way and stage, with its part of what one process takes."""
        columns = ("stage", "split", "processes", "threads each", "p50", "of one process", "error", "sent a step")
        lines = []
        for stage in self.stages:
            rows = self.of_stage(stage)
            alone = next((row for row in rows if row.contender == ALONE), None)
            for row in rows:
                extras = row.extras
                counts = [f"{extras['processes']}", f"{extras['threads_each'] or ''}"]
                if row.p50_seconds is None:
                    lines.append([stage, row.contender, *counts, f"refused: {row.gate_detail}", "", "", ""])
                    continue
                part = (
                    "" if alone is None or alone.p50_seconds is None else f"{row.p50_seconds / alone.p50_seconds:.2f}"
                )
                error = "" if row.error is None or not row.own_error else f"{row.error / row.own_error:.2f}x"
                sent = extras.get("sent_bytes_per_step")
                lines.append(
                    [stage, row.contender, *counts, seconds(row.p50_seconds), part, error, size(sent) if sent else ""]
                )
        return markdown_table(columns, lines)

    def plot(self, others: Sequence[Series]) -> bytes:
        """Bars: the time of each way as a part of one process's."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 0.5 * len(self.rows) + 1.2), layout="constrained")
        axes = figure.subplots()
        labels, parts = [], []
        for stage in self.stages:
            alone = next((row.p50_seconds for row in self.of_stage(stage) if row.contender == ALONE), None)
            for row in self.of_stage(stage):
                if row.p50_seconds is not None and alone is not None:
                    labels.append(f"{stage}, {row.contender}")
                    parts.append(row.p50_seconds / alone)
        axes.barh(labels[::-1], parts[::-1], color=COLORS["green"])
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_xlabel("of one process's time")
        return self.png(figure)

    @classmethod
    def line(cls, row: Row) -> str:
        return f"{seconds(row.p50_seconds)}, {row.gate_detail}" if row.p50_seconds is not None else row.gate_detail

    def conditions(self) -> list[str]:
        """What was run, as parts of `origin`."""
        shape: dict[str, Any] = self.first.shapes
        return [*super().conditions(), f"{shape.get('heads')} heads"]
