"""Whole runs at toy size. What is checked is what is recorded, never how long it took."""

import contextlib
import dataclasses
import functools
import itertools

import pytest
import torch

from cogvx_fast import EngineConfig
from cogvx_fast.bench import runner
from cogvx_fast.bench.contenders import CONTENDERS, Contender, Prepared, ours
from cogvx_fast.bench.measurement import peak_memory, stopwatch
from cogvx_fast.bench.reference import STAGES, build_pipeline
from cogvx_fast.bench.rows import Row
from cogvx_fast.bench.series import Plan
from cogvx_fast.bench.workloads import WORKLOADS
from cogvx_fast.session import current

from .conftest import PROVENANCE

CPU = torch.device("cpu")


def run(workload, contenders, sink=lambda row: None, **options):
    """The rows of contenders, given by name or made up."""
    named = {name: CONTENDERS[name] for name in contenders} if isinstance(contenders, tuple) else contenders
    plan = Plan(workload, **{"dtype": "float32", "device": "cpu", "command": "a command", "warmup": 1, **options})
    return runner.run(plan, named, sink=sink)


def by_stage(rows):
    return {stage: list(same) for stage, same in itertools.groupby(rows, lambda row: row.stage)}


def test_all_stages_make_a_row_for_each_contender_that_differs_there(toy_workload):
    sunk = []
    rows = run(toy_workload, ("diffusers", "ours", "arithmetic", "attention"), sunk.append)
    assert sunk == rows == [Row.from_json(row.to_json()) for row in rows]
    names = {stage: [row.contender for row in same] for stage, same in by_stage(rows).items()}
    both = ["diffusers", "ours"]
    assert names == {
        "text": both,
        "dit-step": [*both, "arithmetic", "attention"],
        "vae-decode": both,
        "generation": both,
    }
    for row in rows:
        assert row.n == 5 and row.first_call_seconds > 0 and row.run == rows[0].run
        assert row.peak_memory_bytes is None or row.peak_memory_bytes >= 0
        if row.gate == "green":
            assert row.error <= row.budget == pytest.approx(1.1 * row.own_error) and row.error < 1e-4
        if row.contender == "diffusers":
            assert row.error == row.own_error and row.engine is None
    own = by_stage(rows)["dit-step"][1]
    assert own.engine == {**own.engine, "tier": "exact", "attention": "auto"}
    assert any(line.startswith("attention: on: sdpa") for line in own.engine_report)
    assert "session whose tables are made already" in own.measures and "session_one_off_seconds" in own.extras
    assert own.shapes["tokens"] == 3 * 2 * 2 + 16 and own.shapes["batch"] == 2
    bound = by_stage(rows)["dit-step"][2]
    assert bound.gate == "none" and bound.error is None and "scaled_dot_product_attention" in bound.measures


def test_calls_alternate_after_warm_up(toy_step):
    order = []

    def build(pipe, workload, stage, name):
        call = CONTENDERS["diffusers"].build(pipe, workload, stage)
        step = STAGES[stage].make(pipe, workload, torch.float32)

        def recorded(number):
            order.append(name)
            return step(number)

        return dataclasses.replace(call, call=recorded)

    contenders = {name: Contender(functools.partial(build, name=name), name) for name in "AB"}
    run(toy_step, contenders, warmup=2, runs=6)
    # First call and the gate's two inputs; then two of warm-up and six that count, in turns; then memory.
    assert "".join(order) == "AAA" + "BBB" + "AB" * 2 + "AB" * 6 + "AB"


def wrong(pipe, workload, stage, scale):
    step = STAGES[stage].make(pipe, workload, torch.float32)
    return Prepared(pipe, call=lambda number: step(number) * scale)


@pytest.mark.parametrize("scale", [1.001, float("nan")])
def test_a_red_gate_refuses_the_speed(toy_step, scale):
    calls = []

    def build(pipe, workload, stage):
        prepared = wrong(pipe, workload, stage, scale)
        return dataclasses.replace(prepared, call=lambda number: (calls.append(number), prepared.call(number))[1])

    rows = run(toy_step, {"diffusers": CONTENDERS["diffusers"], "wrong": Contender(build, "wrong")})
    green, red = rows
    assert green.gate == "green" and red.gate == "red"
    assert (red.n, red.p50_seconds, red.first_call_seconds, red.peak_memory_bytes, red.extras) == (
        0,
        None,
        None,
        None,
        {},
    )
    assert "above the budget" in red.gate_detail if scale == 1.001 else "not finite" in red.gate_detail
    assert len(calls) == 3  # it was judged, and never timed


def test_a_contender_that_fails_is_red_and_the_others_go_on(toy_step):
    def build(pipe, workload, stage):
        raise RuntimeError("no compiler\nand much more")

    rows = run(toy_step, {"broken": Contender(build, "broken"), "diffusers": CONTENDERS["diffusers"]})
    assert [row.gate for row in rows] == ["red", "green"]
    assert rows[0].gate_detail == "failed with RuntimeError: no compiler"


def test_a_red_row_says_which_engine_it_was(toy_step, monkeypatch):
    def build(pipe, workload, stage):
        prepared = ours(pipe, workload, stage, EngineConfig(modulation_table=False))
        return dataclasses.replace(prepared, call=lambda number: torch.zeros(1))

    (row,) = run(toy_step, {"ours": Contender(build, "ours")})
    assert row.gate == "red" and row.engine["modulation_table"] is False and "shape (1,)" in row.gate_detail


def test_weights_are_shared(toy_step):
    seen = {}

    def build(pipe, workload, stage):
        prepared = ours(pipe, workload, stage, EngineConfig())
        seen["reference"], seen["ours"] = pipe.transformer, prepared.pipeline.transformer
        return prepared

    run(toy_step, {"ours": Contender(build, "ours")})
    weights = [seen[who].transformer_blocks[0].ff.net[2].weight for who in ("reference", "ours")]
    assert weights[0].data_ptr() == weights[1].data_ptr()


@pytest.mark.slow
def test_freezing_does_not_leak_to_other_contenders(toy_step, monkeypatch):
    import torch._inductor.compile_fx as inductor
    import torch._inductor.config

    compiled = []

    def without_compiling(graph, inputs, **options):
        compiled.append(torch._inductor.config.freezing)
        return graph.forward

    monkeypatch.setattr(inductor, "compile_fx", without_compiling)
    small = dataclasses.replace(toy_step, checkpoint=None, transformer=TINY, num_frames=1, height=32, width=32)
    names = ("diffusers-compile-freeze", "diffusers-compile", "ours")
    rows = run(small, names)
    assert [row.gate for row in rows] == ["green"] * 3
    # Each compiled a graph of its own, though code and weights are the same, and nothing was compiled later.
    assert compiled == [True, False] and torch._inductor.config.freezing is False
    assert not [row for row in rows if "graphs_compiled_while_timing" in row.extras]


TINY = {
    "num_attention_heads": 1,
    "attention_head_dim": 32,
    "time_embed_dim": 8,
    "text_embed_dim": 8,
    "num_layers": 1,
    "sample_width": 4,
    "sample_height": 4,
    "sample_frames": 1,
    "max_text_seq_length": 4,
}


def test_random_weights_with_rope(toy_step):
    config = TINY | {"use_rotary_positional_embeddings": True}
    workload = dataclasses.replace(toy_step, checkpoint=None, transformer=config, num_frames=1, height=32, width=48)
    rows = run(workload, ("diffusers", "ours"), dtype="bfloat16")
    assert all(0 < row.own_error < 0.05 and row.gate == "green" for row in rows), rows
    assert rows[0].reference == "diffusers, eager, float32"


def test_a_vae_with_random_weights(toy_step):
    vae = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2}
    sizes = {"num_frames": 9, "height": 16, "width": 24}
    workload = dataclasses.replace(
        toy_step, stages=("vae-decode",), checkpoint=None, transformer=TINY, vae=vae, gate_samples=1, **sizes
    )
    rows = run(workload, ("diffusers", "diffusers-compile", "ours", "arithmetic"), dtype="bfloat16")
    assert [(row.contender, row.gate) for row in rows] == [("diffusers", "green"), ("ours", "green")]
    assert all(0 < row.own_error < 0.1 for row in rows)


def test_what_cannot_run_is_refused_before_any_work(toy_step):
    with pytest.raises(ValueError, match="runs=4 must be at least 5"):
        run(toy_step, ("ours",), runs=4)
    with pytest.raises(ValueError, match="needs a CUDA device, not cpu: one step is 240 TFLOP"):
        run(WORKLOADS["dit-2b-full"], ("ours",))


def test_one_call_of_each_where_a_call_takes_minutes(toy_workload):
    def broken(pipe, workload, stage):
        raise RuntimeError("no room")

    workload = dataclasses.replace(toy_workload, stages=("vae-decode", "vae-encode"), one_call=True)
    lossy = Contender(CONTENDERS["diffusers"].build, "another picture", lossy="by design")
    both = {name: CONTENDERS[name] for name in ("diffusers", "ours")}
    rows = run(workload, both | {"lossy": lossy, "broken": Contender(broken, "broken")})
    assert [(row.stage, row.contender) for row in rows] == [
        (stage, name) for stage in workload.stages for name in ("diffusers", "ours", "lossy", "broken")
    ]
    for row in rows:
        if row.contender == "broken":
            assert (row.gate, row.gate_detail, row.n) == ("red", "failed with RuntimeError: no room", 0)
            continue
        assert row.n == 1 and row.p20_seconds == row.p50_seconds == row.first_call_seconds > 0
        assert row.gate == ("lossy" if row.contender == "lossy" else "green")
        assert row.budget is None if row.gate == "lossy" else row.error <= row.budget
    with pytest.raises(ValueError, match="judges by the one call of diffusers"):
        run(workload, {"ours": CONTENDERS["ours"]})


def test_a_gpu_gets_a_warm_up_and_several_calls_where_a_cpu_gets_one(toy_workload, monkeypatch):
    workload = dataclasses.replace(
        toy_workload, stages=("vae-decode",), one_call=True, too_large={"float32": "no room"}
    )
    calls = []

    class Elsewhere(runner._Run):
        """As on a GPU, where the device's type is looked at; the models stay where they can be."""

        def outputs(self, call):
            return [call(number).detach().clone() for number in range(self.plan.workload.gate_samples)]

    def on_a_gpu(device):
        calls.append(device)
        return torch.device("cuda", 0)

    monkeypatch.setattr(runner, "_Run", Elsewhere)
    monkeypatch.setattr(runner.devices, "indexed", on_a_gpu)
    monkeypatch.setattr(runner, "collect", lambda device: PROVENANCE)
    monkeypatch.setattr(runner, "build_pipeline", lambda *arguments: build_pipeline(*arguments[:2], CPU))
    monkeypatch.setattr(runner, "stopwatch", lambda device: stopwatch(CPU))
    monkeypatch.setattr(runner, "peak_memory", lambda call, device: peak_memory(call, CPU))
    monkeypatch.setattr(runner.gpu, "watched", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    rows = run(workload, ("diffusers", "ours"), device="cuda")
    assert calls == ["cuda"]
    assert [(row.n, row.gate) for row in rows] == [(5, "green")] * 2  # and there is a reference: it was tried
    assert all("one warm call" in row.peak_memory_kind for row in rows if row.peak_memory_bytes is not None)


def test_without_room_for_a_reference_the_distance_from_diffusers_is_stated(toy_step, monkeypatch):
    def too_small(pipe, dtype):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40.00 GiB.\nand more")

    monkeypatch.setattr(runner, "widened", too_small)
    rows = run(toy_step, ("diffusers", "ours"))
    assert [row.gate for row in rows] == ["lossy", "lossy"] and rows[0].error == 0 < rows[1].error < 1e-5
    assert rows[1].reference == "diffusers, eager, float32" and rows[1].own_error is None
    assert "no room for a reference in float64: CUDA out of memory. Tried to allocate 40" in rows[1].gate_detail


def test_every_contender_is_called_within_its_own_session(toy_step):
    seen = {}

    def build(pipe, workload, stage, name):
        prepared = ours(pipe, workload, stage, EngineConfig())
        step = STAGES[stage].make(prepared.pipeline, workload, torch.float32)

        def recorded(number):
            session = current(prepared.pipeline.transformer)
            seen.setdefault(name, []).append(session)
            return step(number)

        return dataclasses.replace(prepared, call=recorded)

    rows = run(toy_step, {name: Contender(functools.partial(build, name=name), name) for name in "AB"})
    assert [row.gate for row in rows] == ["green", "green"]
    for name in "AB":
        # One for the gate and the timed calls, then a new one for each first step.
        assert None not in seen[name]
        assert [len(list(same)) for _, same in itertools.groupby(seen[name], id)] == [10, 1, 1, 1, 1, 1]
    assert current(None) is None


def test_a_contender_that_fails_while_it_is_timed_is_red_and_the_others_are_timed(toy_step):
    calls = []

    def build(pipe, workload, stage):
        step = STAGES[stage].make(pipe, workload, torch.float32)

        def call(number):
            calls.append(number)
            if len(calls) > 5:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return step(number)

        return Prepared(pipe, call=call)

    rows = run(toy_step, {"failing": Contender(build, "failing"), "diffusers": CONTENDERS["diffusers"]})
    assert [(row.contender, row.gate, row.n) for row in rows] == [("failing", "red", 0), ("diffusers", "green", 5)]
    assert rows[0].gate_detail == "failed with OutOfMemoryError: CUDA out of memory." and rows[0].p50_seconds is None


def test_where_no_reference_fits_the_distance_from_diffusers_is_stated(toy_workload):
    workload = dataclasses.replace(
        toy_workload, stages=("vae-decode",), one_call=True, too_large={"float32": "no room"}
    )
    rows = run(workload, ("diffusers", "ours"))
    assert [row.gate for row in rows] == ["lossy", "lossy"] and rows[0].error == 0
    assert 0 < rows[1].error < 1e-5 and rows[1].budget is None and rows[1].own_error is None
    assert "no room" in rows[1].gate_detail and rows[1].reference == "diffusers, eager, float32"


def test_a_lossy_contender_is_timed_and_its_distance_stated(toy_step):
    contender = Contender(functools.partial(wrong, scale=1.01), "wrong", lossy="1% more")
    (row,) = run(toy_step, {"wrong": contender})
    assert (row.gate, row.gate_detail, row.budget, row.n) == ("lossy", "1% more", None, 5)
    assert row.error == pytest.approx(0.01, rel=0.01)


def test_a_whole_model_whose_first_layers_are_judged_must_be_finite(toy_step):
    """Its first layers are right, and what comes after them gives NaN."""
    workload, layers = dataclasses.replace(toy_step, gate_layers=1), 3

    def build(pipe, workload, stage):
        step = STAGES[stage].make(pipe, workload, torch.float32)
        whole = pipe.transformer.config.num_layers == layers
        return Prepared(pipe, call=lambda number: step(number) * (float("nan") if whole else 1))

    rows = run(workload, {"diffusers": CONTENDERS["diffusers"], "broken": Contender(build, "broken")})
    assert [(row.contender, row.gate, row.n) for row in rows] == [("diffusers", "green", 5), ("broken", "red", 0)]
    assert rows[1].gate_detail == "the output is not finite"


@pytest.mark.parametrize("one_call", [True, False])
def test_what_is_not_finite_is_red_without_a_reference_too(toy_workload, monkeypatch, one_call):
    def too_small(pipe, dtype):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(runner, "widened", too_small)
    workload = dataclasses.replace(
        toy_workload, stages=("vae-decode",), one_call=one_call, too_large={"float32": "no room"} if one_call else {}
    )
    broken = Contender(functools.partial(wrong, scale=float("nan")), "broken")
    rows = run(workload, {"diffusers": CONTENDERS["diffusers"], "broken": broken})
    assert [row.gate for row in rows] == ["lossy", "red"] and rows[1].gate_detail == "the output is not finite"
