import dataclasses
import itertools

from cogvx_fast.bench import runner
from cogvx_fast.bench.ablation import ADDITIONS, Addition, ablation
from cogvx_fast.config import EngineConfig


def test_each_row_adds_something_and_the_last_is_the_whole_engine():
    configs = [addition.config for addition in ADDITIONS]
    assert configs[-1] == EngineConfig()
    for before, after in itertools.pairwise(configs):
        changed = [f.name for f in dataclasses.fields(before) if getattr(before, f.name) != getattr(after, f.name)]
        assert len(changed) == 1


def test_expectations_are_for_the_workload_they_were_made_for():
    for addition in ADDITIONS:
        assert bool(addition.why) == bool(addition.expected)
    known, other = ablation("dit-2b", "bfloat16"), ablation("demo", "bfloat16")
    assert list(known) == list(other) == ["diffusers", *(addition.name for addition in ADDITIONS)]
    assert known["joint stream"].expected_gain == ADDITIONS[0].expected["dit-2b bfloat16"]
    assert all(contender.expected_gain is contender.expected_why is None for contender in other.values())


def test_the_autoencoder_has_an_ablation_of_its_own(toy_workload):
    workload = dataclasses.replace(toy_workload, name="vae", stages=("vae-decode",))
    contenders = ablation("vae", "float32")
    assert next(iter(contenders)) == "diffusers" and len(contenders) == 5
    rows = runner.run(runner.Plan(workload, contenders, "float32", "cpu", "x", warmup=0, series="ablation"))
    assert [row.gate for row in rows] == ["green", "lossy", "lossy", "lossy", "green"]
    assert all(row.error < 1e-5 and row.expected_gain for row in rows[1:])
    assert list(ablation("vae", "bfloat16"))[-1] == "+ our convolutions"
    assert ablation("vae-clip", "bfloat16")["our layers"].expected_gain is None


def test_rows_carry_the_engine_and_what_was_expected(toy_step):
    additions = [Addition("nothing", EngineConfig(modulation_table=False), {"toy float32": 1.5}, "a guess")]
    rows = runner.run(
        runner.Plan(toy_step, ablation("toy", "float32", additions), "float32", "cpu", "x", warmup=0, series="ablation")
    )
    assert [row.contender for row in rows] == ["diffusers", "nothing"]
    assert {row.series for row in rows} == {"ablation"}
    assert (rows[1].expected_gain, rows[1].expected_why) == (1.5, "a guess")
    assert rows[1].engine["modulation_table"] is False
