"""One run: builds the contenders on shared weights, judges them, times those that passed in turns, makes the rows."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gc
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .contenders import Contender, Prepared
from .gate import Verdict, judge, reference_dtype, relative_error
from .memory import peak_memory
from .models import build_pipeline, widened
from .provenance import Provenance, collect
from .rows import MIN_RUNS, Row
from .stages import STAGES, Stage, StageCall, shapes
from .timing import Summary, alternate, stopwatch
from .workloads import Workload


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        contenders: by name, in the order in which they alternate.
        dtype: name of a torch dtype.
        device: "cpu", "cuda", "cuda:1".
        command: that makes these rows, as a user would type it.
        runs: timed calls of each contender, at least `MIN_RUNS`.
        warmup: calls of each before the first that is timed, those of the gate aside.
        series: one of `rows.SERIES`.
    """

    workload: Workload
    contenders: Mapping[str, Contender]
    dtype: str
    device: str
    command: str
    runs: int = MIN_RUNS
    warmup: int = 2
    series: str = "contenders"
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    def __post_init__(self) -> None:
        if self.runs < MIN_RUNS:
            raise ValueError(f"runs={self.runs} must be at least {MIN_RUNS}")
        self.workload.check(self.device)
        if self.workload.one_call and next(iter(self.contenders)) != "diffusers":
            raise ValueError(f"{self.workload.name} judges by the one call of diffusers: name 'diffusers' first")


def run(
    plan: Plan, sink: Callable[[Row], None] = lambda row: None, tell: Callable[[str], None] = lambda text: None
) -> list[Row]:
    """Run `plan`; every row goes to `sink` when its stage is done.

    A contender whose output is further from the reference than its budget, or that fails, gives a row with a red gate
    and without times; the others go on.

    Args:
        tell: is told, in words, what is being done.

    Returns:
        The rows, stage by stage in the order of the contenders.

    Raises:
        ValueError: for a workload that cannot run on the device, or too few runs, when the plan is made.
    """
    provenance = collect(plan.device)
    with torch.no_grad():
        tell("making the model")
        bench = _Bench(plan, build_pipeline(plan.workload, _dtype(plan), torch.device(plan.device)), provenance, tell)
        expected = bench.expected()
        rows = []
        for stage in plan.workload.stages:
            for row in bench.run_stage(stage, expected[stage]):
                sink(row)
                rows.append(row)
    return rows


@dataclass(frozen=True)
class _Entry:
    """A contender after its first call and its gate; one that failed may have got to neither."""

    contender: Contender
    verdict: Verdict
    prepared: Prepared | None = None
    call: StageCall | None = None
    first_seconds: float | None = None


@dataclass(frozen=True)
class _Bench:
    """A plan, diffusers' pipeline for it, and what all stages share."""

    plan: Plan
    pipe: DiffusionPipeline
    provenance: Provenance
    tell: Callable[[str], None]

    @property
    def device(self) -> torch.device:
        return torch.device(self.plan.device)

    def expected(self) -> dict[str, list[torch.Tensor] | None]:
        """The reference's outputs for the gate's inputs, by stage; its wide models are gone afterwards."""
        if self._too_large is not None:
            return dict.fromkeys(self.plan.workload.stages)
        wide = reference_dtype(_dtype(self.plan))
        oracle, outputs = widened(self.pipe, wide), {}
        # cuDNN's convolutions are TF32 in float32 unless told otherwise: no truth to judge anything by.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for stage in self.plan.workload.stages:
                self.tell(f"{stage}: the reference in {_name(wide)}")
                outputs[stage] = self._outputs(self._call(stage, oracle))
        del oracle
        _free(self.device)
        return outputs

    def run_stage(self, stage: str, expected: list[torch.Tensor]) -> Iterator[Row]:
        """The rows of all contenders of one stage, once all of them are timed."""
        if self.plan.workload.one_call:
            yield from self._run_once(stage, expected)
            return
        torch.compiler.reset()  # what another stage compiled must not make a first call look cheap
        self.tell(f"{stage}: diffusers' own error")
        own = _errors(self._outputs(self._call(stage, self.pipe)), expected)
        with contextlib.ExitStack() as loops:
            entries = {}
            for name, contender in self._contenders(stage).items():
                self.tell(f"{stage}: {name}, first call and gate")
                entries[name] = self._first_call(stage, contender, expected, own, loops)
            passed = {name: entry for name, entry in entries.items() if entry.verdict.gate != "red"}
            measured = self._measure(stage, passed)
        for name, entry in entries.items():
            if name in passed:
                measured[name]["extras"] |= self._extras(stage, name, entry, measured[name]["p50_seconds"])
            yield self._row(stage, name, entry, **measured.get(name, {}))
        _free(self.device)

    def _run_once(self, stage: str, expected: list[torch.Tensor] | None) -> Iterator[Row]:
        """The rows of a stage whose calls take minutes: each contender's one call is timed, measured and judged."""
        clock, own = stopwatch(self.device), None
        for name, contender in self._contenders(stage).items():
            self.tell(f"{stage}: {name}, its one call")
            prepared, results = None, []
            try:
                prepared = contender.build(self.pipe, self.plan.workload, stage)
                call = prepared.call or self._call(stage, prepared.pipeline)
                gc.collect()
                peak, kind = peak_memory(
                    lambda call=call, made=results: made.append(clock(lambda: call(0))), self.device
                )
                seconds, output = results.pop()
                expected = [output.cpu()] if expected is None else expected
                errors = _errors([output.cpu()], expected[:1])
            except Exception as error:  # its own, as in `_first_call`
                yield self._row(stage, name, _failed(contender, error, prepared))
                continue
            del output
            own = errors if own is None else own
            verdict = _verdict(contender, errors, own)
            if self._too_large is not None:
                detail = f"distance from diffusers at the same precision: {self._too_large}"
                verdict = Verdict("lossy", detail, errors[0])
            entry = _Entry(contender, verdict, prepared, call, seconds)
            measured = {
                "n": 1,
                "p20_seconds": seconds,
                "p50_seconds": seconds,
                "p80_seconds": seconds,
                "first_call_seconds": seconds,
                "peak_memory_bytes": peak,
                "peak_memory_kind": kind.replace("one warm call", "the call that is timed, the first of its kind"),
                "engine_report": prepared.report(),
                "extras": {**prepared.extras, **prepared.late_extras()},
            }
            yield self._row(stage, name, entry, **(measured if entry.verdict.gate != "red" else {}))
            _free(self.device)

    def _contenders(self, stage: str) -> dict[str, Contender]:
        return {
            name: contender
            for name, contender in self.plan.contenders.items()
            if stage in contender.stages and (contender.devices is None or self.device.type in contender.devices)
        }

    @property
    def _reference(self) -> str:
        own = _dtype(self.plan)
        return _name(reference_dtype(own) if self._too_large is None else own)

    @property
    def _too_large(self) -> str | None:
        return self.plan.workload.too_large.get(self.plan.dtype)

    def _call(self, stage: str, pipe: DiffusionPipeline) -> StageCall:
        return STAGES[stage].make(pipe, self.plan.workload, _dtype(self.plan))

    def _outputs(self, call: StageCall) -> list[torch.Tensor]:
        # Copies on the CPU: a static buffer of a compiled graph is overwritten by the next call.
        return [call(number).detach().to("cpu", copy=True) for number in range(self.plan.workload.gate_samples)]

    def _first_call(
        self,
        stage: str,
        contender: Contender,
        expected: list[torch.Tensor],
        own: list[float],
        loops: contextlib.ExitStack,
    ) -> _Entry:
        """The first call from a cold compile cache, and the gate. A session that is opened stays open in `loops`."""
        from torch._inductor.utils import fresh_cache

        prepared = None
        try:
            prepared = contender.build(self.pipe, self.plan.workload, stage)
            call = prepared.call or self._call(stage, prepared.pipeline)
            if STAGES[stage].in_loop and prepared.loop is not None:
                loops.enter_context(prepared.loop())
            with fresh_cache(), prepared.compiling():
                seconds, _ = stopwatch(self.device)(lambda: call(0))
                if contender.is_bound:
                    return _Entry(contender, Verdict("none", "computes no result"), prepared, call, seconds)
                verdict = _verdict(contender, _errors(self._outputs(call), expected), own)
        except Exception as error:  # whatever a contender dies of is its own, and goes into its row
            return _failed(contender, error, prepared)
        return _Entry(contender, verdict, prepared, call, seconds)

    def _measure(self, stage: str, entries: Mapping[str, _Entry]) -> dict[str, dict[str, Any]]:
        """Times, memory and report of each, as fields of its row; within the sessions that the first calls opened."""
        plan, clock = self.plan, stopwatch(self.device)
        calls = {name: entry.call for name, entry in entries.items()}
        alternate(calls, plan.warmup, clock, lambda name, number: self.tell(f"{stage}: {name}, warm-up {number + 1}"))
        graphs = _compiled_graphs()
        seconds = alternate(
            calls,
            plan.runs,
            clock,
            lambda name, number: self.tell(f"{stage}: {name}, run {number + 1} of {plan.runs}"),
        )
        late = _compiled_graphs() - graphs
        gc.collect()
        measured = {}
        for name, entry in entries.items():
            summary = Summary.of(seconds[name])
            peak, kind = None, ""
            if STAGES[stage].in_process:
                peak, kind = peak_memory(lambda call=entry.call: call(0), self.device)
            measured[name] = {
                "n": summary.n,
                "p20_seconds": summary.p20,
                "p50_seconds": summary.p50,
                "p80_seconds": summary.p80,
                "first_call_seconds": entry.first_seconds,
                "peak_memory_bytes": peak,
                "peak_memory_kind": kind,
                "engine_report": entry.prepared.report(),
                # Compiling belongs into first calls; where it did not stay there, the times of the run are in doubt.
                "extras": {**entry.prepared.extras, **entry.prepared.late_extras()}
                | ({"graphs_compiled_while_timing": late} if late else {}),
            }
        return measured

    def _extras(self, stage: str, name: str, entry: _Entry, step_seconds: float) -> dict[str, float]:
        """Of an engine in the loop: what the first step of a session costs, and how much of that is not a step but the
        session's tables."""
        if not STAGES[stage].in_loop or entry.prepared.loop is None:
            return {}
        self.tell(f"{stage}: {name}, first steps of new sessions")
        clock, seconds = stopwatch(self.device), []
        for number in range(self.plan.runs):
            with entry.prepared.loop():
                seconds.append(clock(lambda number=number: entry.call(number))[0])
        first = Summary.of(seconds).p50
        return {"first_step_of_a_session_seconds": first, "session_one_off_seconds": first - step_seconds}

    def _row(self, stage: str, name: str, entry: _Entry, **measured: Any) -> Row:
        """The row; without `measured` one that states no speed."""
        prepared, contender, verdict = entry.prepared, entry.contender, entry.verdict
        plan = self.plan
        fields = {
            "engine": prepared.engine if prepared is not None else None,
            "engine_report": [],
            "n": 0,
            "p20_seconds": None,
            "p50_seconds": None,
            "p80_seconds": None,
            "first_call_seconds": None,
            "peak_memory_bytes": None,
            "peak_memory_kind": "",
            "extras": {},
        }
        return Row(
            run=plan.run,
            series=plan.series,
            workload=plan.workload.name,
            stage=stage,
            measures=_measures(STAGES[stage], contender, prepared),
            shapes=shapes(plan.workload, self.pipe),
            dtype=plan.dtype,
            contender=name,
            command=plan.command,
            gate=verdict.gate,
            gate_detail=verdict.detail,
            reference=f"diffusers, eager, {self._reference}",
            error=verdict.error,
            own_error=verdict.own_error,
            budget=verdict.budget,
            expected_gain=contender.expected_gain,
            expected_why=contender.expected_why,
            provenance=self.provenance,
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            **(fields | measured),
        )


def _measures(stage: Stage, contender: Contender, prepared: Prepared | None) -> str:
    note = prepared.note if prepared is not None else ""
    return "; ".join(part for part in ("" if contender.is_bound else stage.measures, note) if part)


def _failed(contender: Contender, error: Exception, prepared: Prepared | None) -> _Entry:
    reason = (str(error).strip().splitlines() or ["no message"])[0][:300]
    return _Entry(contender, Verdict("red", f"failed with {type(error).__name__}: {reason}"), prepared)


def _verdict(contender: Contender, errors: list[float], own: list[float]) -> Verdict:
    verdict = judge(errors, own, contender.floor_db)
    if contender.lossy is None or verdict.error is None:
        return verdict
    return dataclasses.replace(verdict, gate="lossy", detail=contender.lossy, budget=None)


def _errors(outputs: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    return [relative_error(output, truth) for output, truth in zip(outputs, expected, strict=True)]


def _compiled_graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _dtype(plan: Plan) -> torch.dtype:
    return getattr(torch, plan.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
