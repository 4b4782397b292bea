"""One run: builds the contenders on shared weights, judges them, times those that passed in turns, makes the rows."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import gc
import math
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import devices
from . import gpu
from .accuracy import NOT_FINITE, Verdict, judge, reference_dtype, relative_error
from .contenders import Contender, Prepared
from .measurement import Clock, Summary, alternate, peak_memory, stopwatch
from .provenance import Provenance, collect
from .reference import STAGES, Pipeline, StageCall, build_pipeline, dtype_name, first_layers, shapes, widened
from .rows import Row
from .series import Plan, Sink, Tell

Contenders = Mapping[str, Contender]
_SESSIONS_ON_A_GPU = 3


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
    device = devices.indexed(plan.device)
    # On a GPU such a call takes seconds, and the first of its kind compiles.
    calls_once = plan.workload.one_call and device.type == "cpu"
    if calls_once and next(iter(contenders)) != "diffusers":
        raise ValueError(f"{plan.workload.name} judges by the one call of diffusers: name 'diffusers' first")
    provenance = collect(device)
    with torch.no_grad(), devices.current(device):
        tell("making the model")
        dtype: torch.dtype = getattr(torch, plan.dtype)
        pipe = build_pipeline(plan.workload, dtype, device)
        bench = _Run(plan, contenders, series, pipe, provenance, tell, dtype, device)
        expected = bench.expected()
        rows = []
        for stage in plan.workload.stages:
            of_stage = bench.call_once if calls_once else bench.take_turns
            for row in of_stage(stage, expected[stage]):
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
    """One whose gate is not red, after its first call.

    Attributes:
        call: made within a context of its own, in which its session is the running one.
    """

    prepared: Prepared
    call: StageCall
    first_seconds: float


@dataclass(frozen=True)
class _Expected:
    """The truth for the gate's inputs in one stage, or, without room for one, why not.

    Attributes:
        outputs: of the reference, one for each of the gate's inputs; empty without room for it.
        why_none: what keeps this device from computing it; empty where nothing does.
    """

    outputs: list[torch.Tensor] = field(default_factory=list)
    why_none: str = ""


class _MeasuringError(Exception):
    """A contender that passed its gate failed later; says which."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


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
    number: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    @functools.cached_property
    def gate_pipe(self) -> Pipeline:
        """What the gate judges: `pipe`, or its first layers."""
        return first_layers(self.pipe, self.plan.workload.gate_layers)

    def expected(self) -> dict[str, _Expected]:
        """The reference's outputs for the gate's inputs, by stage; its wide models are gone afterwards."""
        if self.device.type == "cpu" and self.too_large is not None:
            return dict.fromkeys(self.plan.workload.stages, _Expected(why_none=self.too_large))
        wide, found = reference_dtype(self.dtype), {}
        # cuDNN's convolutions are TF32 in float32 unless told otherwise: no truth to judge anything by.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for stage in self.plan.workload.stages:
                self.tell(f"{stage}: the reference in {dtype_name(wide)}")
                try:
                    oracle = widened(self.gate_pipe, wide)
                    found[stage] = _Expected(self.outputs(self.stage_call(stage, oracle)))
                except torch.OutOfMemoryError as error:
                    found[stage] = _Expected(
                        why_none=f"no room for a reference in {dtype_name(wide)}: {_first_line(error)}"
                    )
                oracle = None
                self.free()
        return found

    def take_turns(self, stage: str, expected: _Expected) -> Iterator[Row]:
        """The rows of all contenders of one stage, once all of them are timed."""
        torch.compiler.reset()  # what another stage compiled must not make a first call look cheap
        self.tell(f"{stage}: diffusers' own error")
        own_outputs = self.outputs(self.stage_call(stage, self.gate_pipe))
        if expected.why_none:
            expected = dataclasses.replace(expected, outputs=own_outputs)
        own = _errors(own_outputs, expected.outputs)
        with contextlib.ExitStack() as loops:
            entries = {}
            for name, contender in self.contenders_of(stage).items():
                self.tell(f"{stage}: {name}, first call and gate")
                entries[name] = self.first_call(stage, contender, expected, own, loops)
            measured = self.measure(stage, entries)
            for name, entry in entries.items():
                if isinstance(entry, _Passed):
                    costs = self.session_costs(stage, name, entry, measured[name]["p50_seconds"])
                    measured[name]["extras"] |= costs
        for name, entry in entries.items():
            yield self.row(stage, name, entry, expected, **measured.get(name, {}))

    def call_once(self, stage: str, expected: _Expected) -> Iterator[Row]:
        """The rows of a stage whose calls take minutes: each contender's one call is timed, measured and judged."""
        own = None
        for name, contender in self.contenders_of(stage).items():
            self.tell(f"{stage}: {name}, its one call")
            prepared: Prepared | None = None
            try:
                prepared = contender.build(self.pipe, self.plan.workload, stage)
                call = prepared.call or self.stage_call(stage, prepared.pipeline)
                gc.collect()
                once = functools.partial(self.clock(stage), functools.partial(call, 0))
                peak, kind, (seconds, output) = peak_memory(once, self.device)
                if not expected.outputs:
                    expected = dataclasses.replace(expected, outputs=[output.cpu()])
                errors = _errors([output.cpu()], expected.outputs[:1])
            except Exception as error:  # its own, as in `first_call`
                yield self.row(stage, name, _failed(contender, error, prepared), expected)
                continue
            del output
            own = errors if own is None else own
            verdict = self.verdict(contender, errors, own, expected)
            if verdict.gate == "red":
                yield self.row(stage, name, _Judged(contender, verdict, prepared), expected)
            else:
                kind = kind.replace("one warm call", "the call that is timed, the first of its kind")
                entry = _Passed(contender, verdict, prepared, call, seconds)
                yield self.row(stage, name, entry, expected, **_measured(entry, [seconds], peak, kind))
            self.free()

    def contenders_of(self, stage: str) -> Contenders:
        return {
            name: contender
            for name, contender in self.contenders.items()
            if stage in contender.stages and contender.why_not(self.device, self.plan.workload) is None
        }

    @property
    def too_large(self) -> str | None:
        return self.plan.workload.too_large.get(self.plan.dtype)

    def clock(self, stage: str) -> Clock:
        """What times a call of a stage: what another process does, no event of this one's GPU sees."""
        return stopwatch(self.device if STAGES[stage].in_process else torch.device("cpu"))

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
        expected: _Expected,
        own: list[float],
        loops: contextlib.ExitStack,
    ) -> _Judged:
        """The first call from a cold compile cache, and the gate. A session that is opened ends with `loops`.

        Each contender has a context of its own, in the sense of `contextvars`: that is where the engine looks for the
        running session, and several are open at a time.
        """
        from torch._inductor.utils import fresh_cache

        prepared, context = None, contextvars.copy_context()
        try:
            prepared = contender.build(self.pipe, self.plan.workload, stage)
            made = prepared.call or self.stage_call(stage, prepared.pipeline)
            if STAGES[stage].in_loop and prepared.loop is not None:
                loop = prepared.loop()
                context.run(_enter, loop)
                loops.callback(lambda: context.run(_leave, loop))
            call = _within(context, made)
            # Inductor's settings are of a context, too: they are made in that of the calls and in that of the gate.
            with fresh_cache(), prepared.compiling(), contextlib.ExitStack() as compiling:
                settings = prepared.compiling()
                context.run(_enter, settings)
                compiling.callback(lambda: context.run(_leave, settings))
                seconds, output = self.clock(stage)(lambda: call(0))
                if contender.is_bound:
                    verdict = Verdict("none", "computes no result")
                # Of a whole model whose first layers are judged, this is all that is looked at.
                elif self.gate_pipe is not self.pipe and not bool(output.isfinite().all()):
                    verdict = NOT_FINITE
                else:
                    del output
                    errors = self.gate_errors(stage, contender, call, expected)
                    verdict = self.verdict(contender, errors, own, expected)
        except Exception as error:  # whatever a contender dies of is its own, and goes into its row
            return _failed(contender, error, prepared)
        if verdict.gate == "red":
            return _Judged(contender, verdict, prepared)
        return _Passed(contender, verdict, prepared, call, seconds)

    def gate_errors(self, stage: str, contender: Contender, call: StageCall, expected: _Expected) -> list[float]:
        """How far a contender is from the reference; `call` is its own on the whole model."""
        if self.gate_pipe is self.pipe:
            return _errors(self.outputs(call), expected.outputs)
        # The same contender on the first layers, whose sessions and what it compiles are its own.
        prepared = contender.build(self.gate_pipe, self.plan.workload, stage)
        loop = prepared.loop if STAGES[stage].in_loop else None
        with contextlib.nullcontext() if loop is None else loop():
            return _errors(self.outputs(self.stage_call(stage, prepared.pipeline)), expected.outputs)

    def verdict(self, contender: Contender, errors: list[float], own: list[float], expected: _Expected) -> Verdict:
        if expected.why_none:
            detail = f"distance from diffusers at the same precision: {expected.why_none}"
            distance = sum(errors) / len(errors)
            return Verdict("lossy", detail, distance) if math.isfinite(distance) else NOT_FINITE
        found = judge(errors, own, contender.floor_db)
        layers, of = self.plan.workload.gate_layers, self.pipe.transformer.config.num_layers
        if layers is not None and found.error is not None:
            found = dataclasses.replace(found, detail=f"{found.detail}; judged on {layers} of {of} layers")
        if contender.lossy is None or found.error is None:
            return found
        return dataclasses.replace(found, gate="lossy", detail=contender.lossy, budget=None)

    def measure(self, stage: str, entries: dict[str, _Judged]) -> dict[str, dict[str, Any]]:
        """Times, memory and report of each that passed, as fields of its row; within the sessions that are open.

        One that fails is judged red in `entries`, and the others begin anew.
        """
        while True:
            passed = {name: entry for name, entry in entries.items() if isinstance(entry, _Passed)}
            try:
                return self.measure_all(stage, passed)
            except _MeasuringError as failed:
                entry, error = passed[failed.name], failed.__cause__
                assert isinstance(error, Exception)
                entries[failed.name] = _failed(entry.contender, error, entry.prepared)
                del failed, error
                self.free()

    def measure_all(self, stage: str, passed: Mapping[str, _Passed]) -> dict[str, dict[str, Any]]:
        runs, clock = self.plan.runs, self.clock(stage)
        warmup = self.plan.workload.warmup if self.plan.warmup is None else self.plan.warmup
        calls = {name: functools.partial(_named, name, entry.call) for name, entry in passed.items()}

        def saying(what: str, of: str = "") -> Callable[[str, int], None]:
            return lambda name, number: self.tell(f"{stage}: {name}, {what} {number + 1}{of}")

        alternate(calls, warmup, clock, saying("warm-up"))
        graphs = _compiled_graphs()
        with gpu.watched(self.device) as watch:
            around = contextlib.nullcontext if watch is None else watch.span
            seconds = alternate(calls, runs, clock, saying("run", f" of {runs}"), around)
        late = _compiled_graphs() - graphs
        gc.collect()
        measured = {}
        for name, entry in passed.items():
            peak, kind = None, ""
            if STAGES[stage].in_process:
                peak, kind, _ = peak_memory(functools.partial(calls[name], 0), self.device)
            measured[name] = _measured(entry, seconds[name], peak, kind)
            measured[name]["gpu_state"] = None if watch is None else watch.state(name)
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
        seconds, call = [], entry.prepared.call or self.stage_call(stage, entry.prepared.pipeline)
        # On a GPU a step of a whole model is long, and the difference hardly varies.
        for number in range(self.plan.runs if self.device.type == "cpu" else _SESSIONS_ON_A_GPU):
            with loop():
                seconds.append(self.clock(stage)(functools.partial(call, number))[0])
        first = Summary.of(seconds).p50
        return {"first_step_of_a_session_seconds": first, "session_one_off_seconds": first - step_seconds}

    def row(self, stage: str, name: str, entry: _Judged, expected: _Expected, **measured: Any) -> Row:
        """The row; without `measured` one that states no speed."""
        prepared, contender, verdict = entry.prepared, entry.contender, entry.verdict
        notes = (
            "" if contender.is_bound else STAGES[stage].measures,
            "" if prepared is None else prepared.note,
            "a rehearsal at toy size: its time says nothing" if self.plan.workload.is_rehearsal else "",
        )
        reference = self.dtype if expected.why_none else reference_dtype(self.dtype)
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


def _within(context: contextvars.Context, made: StageCall) -> StageCall:
    """`made`, called in `context`."""
    return lambda number: context.run(made, number)


def _enter(loop: contextlib.AbstractContextManager[Any]) -> None:
    loop.__enter__()


def _leave(loop: contextlib.AbstractContextManager[Any]) -> None:
    loop.__exit__(None, None, None)


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


def _named(name: str, call: StageCall, number: int) -> torch.Tensor:
    """A contender's call, whose failure says whose it is."""
    try:
        return call(number)
    except Exception as error:
        raise _MeasuringError(name) from error


def _failed(contender: Contender, error: Exception, prepared: Prepared | None) -> _Judged:
    return _Judged(contender, Verdict("red", f"failed with {type(error).__name__}: {_first_line(error)}"), prepared)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]


def _errors(outputs: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    return [relative_error(output, truth) for output, truth in zip(outputs, expected, strict=True)]


def _compiled_graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
