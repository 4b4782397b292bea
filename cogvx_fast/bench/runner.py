"""One run: builds the contenders on shared weights, judges them, times those that passed in turns, makes the rows."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .accuracy import Verdict, judge, reference_dtype, relative_error
from .contenders import Contender, Prepared
from .measurement import Clock, Summary, alternate, peak_memory, stopwatch
from .provenance import Provenance, collect
from .reference import STAGES, Pipeline, StageCall, build_pipeline, dtype_name, shapes, widened
from .rows import Row
from .series import Plan, Sink, Tell

Contenders = Mapping[str, Contender]


def run(
    plan: Plan,
    contenders: Contenders,
    series: str = "contenders",
    sink: Sink = lambda row: None,
    tell: Tell = lambda text: None,
) -> list[Row]:
    """Run `contenders`, by name, in turns of this order; every row goes to `sink` when its stage is done.

    A contender whose output is further from the reference than its budget, or that fails, gives a row with a red gate
    and without times; the others go on.

    Args:
        series: name of the series that the rows are of.
        tell: is told, in words, what is being done.

    Returns:
        The rows, stage by stage in the order of the contenders.

    Raises:
        ValueError: if calls are made once and the first contender is not diffusers, whose call judges the others.
    """
    if plan.workload.one_call and next(iter(contenders)) != "diffusers":
        raise ValueError(f"{plan.workload.name} judges by the one call of diffusers: name 'diffusers' first")
    provenance, device = collect(plan.device), torch.device(plan.device)
    with torch.no_grad():
        tell("making the model")
        dtype: torch.dtype = getattr(torch, plan.dtype)
        pipe = build_pipeline(plan.workload, dtype, device)
        bench = _Run(plan, contenders, series, pipe, provenance, tell, dtype, device, stopwatch(device))
        expected = bench.expected()
        rows = []
        for stage in plan.workload.stages:
            of_stage = bench.call_once if plan.workload.one_call else bench.take_turns
            for row in of_stage(stage, expected.get(stage)):
                sink(row)
                rows.append(row)
            bench.free()
    return rows


@dataclass(frozen=True)
class _Judged:
    """A contender after its gate; where it failed, it may not have been made ready."""

    contender: Contender
    verdict: Verdict
    prepared: Prepared | None


@dataclass(frozen=True)
class _Passed(_Judged):
    """One whose gate is not red, after its first call."""

    prepared: Prepared
    call: StageCall
    first_seconds: float


@dataclass(frozen=True)
class _Run:
    """A plan, diffusers' pipeline for it, and what all stages share."""

    plan: Plan
    contenders: Contenders
    series: str
    pipe: Pipeline
    provenance: Provenance
    tell: Tell
    dtype: torch.dtype
    device: torch.device
    clock: Clock
    number: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    def expected(self) -> dict[str, list[torch.Tensor]]:
        """The reference's outputs for the gate's inputs, by stage; its wide models are gone afterwards.

        Empty where a wider precision is too large for the machine.
        """
        if self.too_large is not None:
            return {}
        wide, outputs = reference_dtype(self.dtype), {}
        oracle = widened(self.pipe, wide)
        # cuDNN's convolutions are TF32 in float32 unless told otherwise: no truth to judge anything by.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for stage in self.plan.workload.stages:
                self.tell(f"{stage}: the reference in {dtype_name(wide)}")
                outputs[stage] = self.outputs(self.stage_call(stage, oracle))
        del oracle
        self.free()
        return outputs

    def take_turns(self, stage: str, expected: list[torch.Tensor] | None) -> Iterator[Row]:
        """The rows of all contenders of one stage, once all of them are timed."""
        assert expected is not None, "a reference is too large for stages of one call only"
        torch.compiler.reset()  # what another stage compiled must not make a first call look cheap
        self.tell(f"{stage}: diffusers' own error")
        own = _errors(self.outputs(self.stage_call(stage, self.pipe)), expected)
        with contextlib.ExitStack() as loops:
            entries = {}
            for name, contender in self.contenders_of(stage).items():
                self.tell(f"{stage}: {name}, first call and gate")
                entries[name] = self.first_call(stage, contender, expected, own, loops)
            passed = {name: entry for name, entry in entries.items() if isinstance(entry, _Passed)}
            measured = self.measure(stage, passed)
        for name, entry in entries.items():
            if isinstance(entry, _Passed):
                measured[name]["extras"] |= self.session_costs(stage, name, entry, measured[name]["p50_seconds"])
            yield self.row(stage, name, entry, **measured.get(name, {}))

    def call_once(self, stage: str, expected: list[torch.Tensor] | None) -> Iterator[Row]:
        """The rows of a stage whose calls take minutes: each contender's one call is timed, measured and judged."""
        own = None
        for name, contender in self.contenders_of(stage).items():
            self.tell(f"{stage}: {name}, its one call")
            prepared: Prepared | None = None
            try:
                prepared = contender.build(self.pipe, self.plan.workload, stage)
                call = prepared.call or self.stage_call(stage, prepared.pipeline)
                gc.collect()
                once = functools.partial(self.clock, functools.partial(call, 0))
                peak, kind, (seconds, output) = peak_memory(once, self.device)
                expected = [output.cpu()] if expected is None else expected
                errors = _errors([output.cpu()], expected[:1])
            except Exception as error:  # its own, as in `first_call`
                yield self.row(stage, name, _failed(contender, error, prepared))
                continue
            del output
            own = errors if own is None else own
            verdict = _verdict(contender, errors, own)
            if self.too_large is not None:
                detail = f"distance from diffusers at the same precision: {self.too_large}"
                verdict = Verdict("lossy", detail, errors[0])
            if verdict.gate == "red":
                yield self.row(stage, name, _Judged(contender, verdict, prepared))
            else:
                kind = kind.replace("one warm call", "the call that is timed, the first of its kind")
                entry = _Passed(contender, verdict, prepared, call, seconds)
                yield self.row(stage, name, entry, **_measured(entry, [seconds], peak, kind))
            self.free()

    def contenders_of(self, stage: str) -> Contenders:
        return {
            name: contender
            for name, contender in self.contenders.items()
            if stage in contender.stages and (contender.devices is None or self.device.type in contender.devices)
        }

    @property
    def too_large(self) -> str | None:
        return self.plan.workload.too_large.get(self.plan.dtype)

    def stage_call(self, stage: str, pipe: Pipeline) -> StageCall:
        return STAGES[stage].make(pipe, self.plan.workload, self.dtype)

    def outputs(self, call: StageCall) -> list[torch.Tensor]:
        # Copies on the CPU: a static buffer of a compiled graph is overwritten by the next call.
        return [call(number).detach().to("cpu", copy=True) for number in range(self.plan.workload.gate_samples)]

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def first_call(
        self,
        stage: str,
        contender: Contender,
        expected: list[torch.Tensor],
        own: list[float],
        loops: contextlib.ExitStack,
    ) -> _Judged:
        """The first call from a cold compile cache, and the gate. A session that is opened stays open in `loops`."""
        from torch._inductor.utils import fresh_cache

        prepared = None
        try:
            prepared = contender.build(self.pipe, self.plan.workload, stage)
            call = prepared.call or self.stage_call(stage, prepared.pipeline)
            if STAGES[stage].in_loop and prepared.loop is not None:
                loops.enter_context(prepared.loop())
            with fresh_cache(), prepared.compiling():
                seconds, _ = self.clock(lambda: call(0))
                verdict = (
                    Verdict("none", "computes no result")
                    if contender.is_bound
                    else _verdict(contender, _errors(self.outputs(call), expected), own)
                )
        except Exception as error:  # whatever a contender dies of is its own, and goes into its row
            return _failed(contender, error, prepared)
        if verdict.gate == "red":
            return _Judged(contender, verdict, prepared)
        return _Passed(contender, verdict, prepared, call, seconds)

    def measure(self, stage: str, entries: Mapping[str, _Passed]) -> dict[str, dict[str, Any]]:
        """Times, memory and report of each, as fields of its row; within the sessions that the first calls opened."""
        runs, warmup = self.plan.runs, self.plan.warmup
        calls = {name: entry.call for name, entry in entries.items()}

        def saying(what: str, of: str = "") -> Callable[[str, int], None]:
            return lambda name, number: self.tell(f"{stage}: {name}, {what} {number + 1}{of}")

        alternate(calls, warmup, self.clock, saying("warm-up"))
        graphs = _compiled_graphs()
        seconds = alternate(calls, runs, self.clock, saying("run", f" of {runs}"))
        late = _compiled_graphs() - graphs
        gc.collect()
        measured = {}
        for name, entry in entries.items():
            peak, kind = None, ""
            if STAGES[stage].in_process:
                peak, kind, _ = peak_memory(functools.partial(entry.call, 0), self.device)
            measured[name] = _measured(entry, seconds[name], peak, kind)
            # Compiling belongs into first calls; where it did not stay there, the times of the run are in doubt.
            measured[name]["extras"] |= {"graphs_compiled_while_timing": late} if late else {}
        return measured

    def session_costs(self, stage: str, name: str, entry: _Passed, step_seconds: float) -> dict[str, float]:
        """Of an engine in the loop: what the first step of a session costs, and how much of that is not a step but the
        session's tables."""
        loop = entry.prepared.loop
        if not STAGES[stage].in_loop or loop is None:
            return {}
        self.tell(f"{stage}: {name}, first steps of new sessions")
        seconds = []
        for number in range(self.plan.runs):
            with loop():
                seconds.append(self.clock(functools.partial(entry.call, number))[0])
        first = Summary.of(seconds).p50
        return {"first_step_of_a_session_seconds": first, "session_one_off_seconds": first - step_seconds}

    def row(self, stage: str, name: str, entry: _Judged, **measured: Any) -> Row:
        """The row; without `measured` one that states no speed."""
        prepared, contender, verdict = entry.prepared, entry.contender, entry.verdict
        notes = ("" if contender.is_bound else STAGES[stage].measures, "" if prepared is None else prepared.note)
        reference = self.dtype if self.too_large is not None else reference_dtype(self.dtype)
        return Row(
            run=self.number,
            series=self.series,
            workload=self.plan.workload.name,
            stage=stage,
            measures="; ".join(filter(None, notes)),
            shapes=shapes(self.plan.workload, self.pipe),
            dtype=self.plan.dtype,
            contender=name,
            engine=None if prepared is None else prepared.engine,
            command=self.plan.command,
            gate=verdict.gate,
            gate_detail=verdict.detail,
            reference=f"diffusers, eager, {dtype_name(reference)}",
            error=verdict.error,
            own_error=verdict.own_error,
            budget=verdict.budget,
            expected_gain=contender.expected_gain,
            expected_why=contender.expected_why,
            provenance=self.provenance,
            **measured,
        )


def _measured(entry: _Passed, seconds: list[float], peak: int | None, kind: str) -> dict[str, Any]:
    """Times, memory and report as fields of a row."""
    summary = Summary.of(seconds)
    return {
        "n": summary.n,
        "p20_seconds": summary.p20,
        "p50_seconds": summary.p50,
        "p80_seconds": summary.p80,
        "first_call_seconds": entry.first_seconds,
        "peak_memory_bytes": peak,
        "peak_memory_kind": kind,
        "engine_report": entry.prepared.report(),
        "extras": {**entry.prepared.extras, **entry.prepared.late_extras()},
    }


def _failed(contender: Contender, error: Exception, prepared: Prepared | None) -> _Judged:
    reason = (str(error).strip().splitlines() or ["no message"])[0][:300]
    return _Judged(contender, Verdict("red", f"failed with {type(error).__name__}: {reason}"), prepared)


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
