import dataclasses

import pytest
import torch

import cogvx_fast
from cogvx_fast.bench import runner
from cogvx_fast.bench.report import BEGIN, END, NOTHING
from cogvx_fast.bench.results import append, read
from cogvx_fast.bench.workloads import WORKLOADS, Workload
from tests.bench.conftest import refused, row


@pytest.fixture
def made(monkeypatch):
    """Replaces the run: what it would have made, and the plans that it was given, with names of contenders."""
    plans, results = [], [row("diffusers", 1.0, first_call_seconds=1.0), row("ours", 0.5, first_call_seconds=3.0)]

    def fake(plan, contenders, series, sink, tell):
        plans.append((plan, list(contenders), series))
        tell("dit-step: ours, run 1 of 5")
        for one in results:
            sink(dataclasses.replace(one, dtype=plan.dtype, command=plan.command, series=series))
        return results

    monkeypatch.setattr(runner, "run", fake)
    return plans, results


def test_list_shows_workloads_and_contenders(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    shown = run("bench", "list").stdout
    for name in (*WORKLOADS, "diffusers-compile-freeze", "ours", "needs CUDA: one step is 240 TFLOP"):
        assert name in shown


def test_run_adds_rows_and_says_what_was_measured(run, made, tmp_path):
    result = run("bench", "run", "dit-2b", "--dtype", "bfloat16", "--contenders", "diffusers, ours", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert "ours" in result.stdout and "500 ms (450 ms to 550 ms), first call 3.00 s" in result.stdout
    assert "dit-step: ours makes up for its first call after 5 calls" in result.stdout
    assert "added 2 rows to benchmarks/results/dit-2b.jsonl" in result.stdout
    written = read(tmp_path / "here" / "benchmarks" / "results")
    assert [one.contender for one in written] == ["diffusers", "ours"]
    assert written[0].command == (
        "cogvx-fast bench run dit-2b --dtype bfloat16 --contenders 'diffusers, ours' --runs 5 --device cpu"
    )
    ((plan, contenders, series),) = made[0]
    assert (contenders, plan.runs, series) == (["diffusers", "ours"], 5, "contenders")


def test_all_dtypes_of_the_workload_and_the_ablation(run, made, tmp_path):
    out = tmp_path / "rows.jsonl"
    assert run("bench", "run", "dit-2b", "--ablation", "--steps", 7, "--out", out, "--device", "cpu").exit_code == 0
    assert [plan.dtype for plan, _, _ in made[0]] == ["bfloat16", "float32"]
    assert all(series == "ablation" and plan.workload.steps == 7 for plan, _, series in made[0])
    assert made[0][0][1][:2] == ["diffusers", "joint stream"]
    written = read(out)
    assert len(written) == 4 and written[0].command.endswith("--steps 7 --device cpu --ablation")


def test_a_second_gpu_is_where_it_runs_and_what_the_command_says(run, made, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    result = run("bench", "run", "dit-5b-full", "--device", "cuda:1", "--out", tmp_path / "rows.jsonl")
    assert result.exit_code == 0, result.stderr
    ((plan, contenders, _),) = made[0]
    assert plan.device == "cuda:1" and tuple(contenders) == WORKLOADS["dit-5b-full"].contenders
    assert read(tmp_path / "rows.jsonl")[0].command.endswith("--device cuda:1")
    result = run("bench", "run", "dit-2b", "--device", "cuda:2")
    assert result.exit_code == 2 and "is not there; available: cuda:0 (Some GPU), cuda:1 (Some" in result.stderr


def test_a_rehearsal_runs_anywhere_and_says_what_is_left_out(run, made, tmp_path):
    result = run("bench", "run", "dit-5b-full", "--toy", "--device", "cpu", "--out", tmp_path / "rows.jsonl")
    assert result.exit_code == 0, result.stderr
    assert "dit-5b-full-toy bfloat16 without ours-triton: it runs on cuda, not on cpu" in result.stdout
    ((plan, contenders, _),) = made[0]
    assert plan.workload.is_rehearsal and {"ours-eager", "products"} < set(contenders)
    assert plan.command.endswith("--device cpu --toy")


def test_a_red_gate_is_said_and_fails(run, made, tmp_path):
    made[1].append(refused())
    result = run("bench", "run", "dit-2b", "--dtype", "float32", "--out", tmp_path / "rows.jsonl", "--device", "cpu")
    assert result.exit_code == 1
    assert "REFUSED, error 2 is above the budget of 1" in result.stdout
    assert "the correctness gate is red, no speed is stated, for: bfloat16 dit-step wrong" in result.stderr
    assert len(read(tmp_path / "rows.jsonl")) == 3


def test_a_real_run_of_toy_size(run, checkpoint, tmp_path, monkeypatch):
    toy = Workload("toy", "toy", ("dit-step",), checkpoint=str(checkpoint), steps=2, gate_samples=1)
    monkeypatch.setitem(WORKLOADS, "toy", toy)
    out = tmp_path / "rows.jsonl"
    result = run(
        *(
            "bench",
            "run",
            "toy",
            "--dtype",
            "float32",
            "--contenders",
            "diffusers,ours",
            "--device",
            "cpu",
            "--out",
            out,
        )
    )
    assert result.exit_code == 0, result.stderr
    assert [one.gate for one in read(out)] == ["green", "green"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "WORKLOAD 'nothing': is unknown; allowed: demo, demo-cold, "),
        (["dit-2b-full", "--device", "cpu"], "WORKLOAD 'dit-2b-full': needs a CUDA device, not cpu: one step is 240"),
        (["dit-2b", "--contenders", "ours,theirs"], "--contenders 'theirs': is unknown; allowed: diffusers, "),
        (
            ["dit-2b", "--contenders", "diffusers,ours-triton", "--device", "cpu"],
            "--contenders 'diffusers,ours-triton': contender 'ours-triton': it runs on cuda, not on cpu",
        ),
        (["dit-2b", "--toy"], "--toy: dit-2b has no toy size; those that have: dit-2b-full"),
        (["dit-2b", "--contenders", "ours", "--ablation"], "--contenders 'ours': cannot be combined with --ablation"),
        (["dit-2b", "--contenders", "ours", "--sizes"], "--contenders 'ours': cannot be combined with --sizes"),
        (["dit-2b", "--sizes", "--recipes"], "--recipes: cannot be combined with --sizes"),
        (["vae", "--sizes", "--device", "cpu"], "WORKLOAD 'vae': --sizes needs one with a transformer of real layer"),
        (["dit-2b", "--runs", 4], "--runs 4: must be at least 5"),
        (["dit-2b", "--steps", 0], "--steps 0: must be at least 1"),
        (["dit-2b", "--device", "tpu"], "--device 'tpu': is not there; available: "),
        (["dit-2b", "--out", "rows.txt"], "--out 'rows.txt': must end in .jsonl"),
        (["dit-2b", "--out", "/proc/rows.jsonl"], "--out '/proc/rows.jsonl': cannot be written: "),
        (["dit-2b", "--out", "/dev/null/rows.jsonl"], "--out '/dev/null/rows.jsonl': cannot be written: Not a dir"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(run, made, arguments, message):
    result = run("bench", "run", *arguments)
    assert result.exit_code == 2 and message in result.stderr
    assert not made[0] and not result.files


def test_links_to_where_nothing_can_be_are_refused_before_any_work(run, made, tmp_path):
    for target in ("itself.jsonl", "/proc/none/rows.jsonl", "/dev/null/rows.jsonl"):
        link = tmp_path / "itself.jsonl"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        result = run("bench", "run", "dit-2b", "--out", link, "--device", "cpu")
        assert result.exit_code == 2 and "itself.jsonl': cannot be written: " in result.stderr and not made[0]


def test_rows_go_through_a_link(run, made, tmp_path):
    (tmp_path / "rows.jsonl").symlink_to(tmp_path / "new" / "folder" / "rows.jsonl")
    assert run("bench", "run", "dit-2b", "--out", tmp_path / "rows.jsonl", "--device", "cpu").exit_code == 0
    assert read(tmp_path / "new" / "folder" / "rows.jsonl") and (tmp_path / "rows.jsonl").is_symlink()


def test_rows_of_another_schema_are_refused_before_any_work(run, made, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"schema": 99}\n')
    result = run("bench", "run", "dit-2b", "--out", tmp_path / "rows.jsonl", "--device", "cpu")
    assert result.exit_code == 2 and not made[0]
    assert "has a row that cannot be read" in result.stderr and "rows.jsonl:1: schema=99" in result.stderr


def test_an_installation_without_the_demo_checkpoint_says_so(run, made, monkeypatch):
    def missing():
        raise FileNotFoundError("the demo checkpoint is missing from this installation: folder")

    monkeypatch.setattr(cogvx_fast, "demo_checkpoint", missing, raising=False)
    result = run("bench", "run", "demo")
    assert result.exit_code == 2 and "WORKLOAD 'demo': the demo checkpoint is missing" in result.stderr


def test_interrupted_runs_keep_their_rows(run, tmp_path, monkeypatch):
    def interrupted(plan, contenders, series, sink, tell):
        sink(row())
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupted)
    result = run("bench", "run", "dit-2b", "--out", tmp_path / "rows.jsonl", "--device", "cpu")
    assert result.exit_code == 130 and "rows of the stages that were finished are kept" in result.stderr
    assert len(read(tmp_path / "rows.jsonl")) == 1


@pytest.fixture
def place(tmp_path):
    """An empty folder as `run` uses it, with a README that has markers, and a row."""
    (tmp_path / "here").mkdir(exist_ok=True)
    (tmp_path / "here" / "README.md").write_text(f"# Name\n{BEGIN}\n{END}\n")
    append(tmp_path / "here" / "benchmarks" / "results" / "a.jsonl", row())
    return tmp_path / "here"


def test_report_writes_page_plots_and_readme(run, place):
    pytest.importorskip("matplotlib")
    assert run("bench", "report", "--check").exit_code == 1
    result = run("bench", "report")
    assert result.exit_code == 0, result.stderr
    assert {"docs/benchmarks.md", "docs/benchmarks/dit-2b-bfloat16-some-cpu-r.png"} <= set(result.files)
    assert "[all rows](docs/benchmarks.md)" in (place / "README.md").read_text()
    assert "](benchmarks/dit-2b-bfloat16-some-cpu-r.png)" in (place / "docs" / "benchmarks.md").read_text()
    assert run("bench", "report", "--check").exit_code == 0


def test_report_without_rows(run, place):
    (place / "benchmarks" / "results" / "a.jsonl").unlink()
    assert run("bench", "report").exit_code == 0
    assert NOTHING in (place / "README.md").read_text()


def test_report_errors(run, place):
    assert "--results 'none': cannot be read: No such file" in run("bench", "report", "--results", "none").stderr
    (place / "README.md").write_text("no markers")
    result = run("bench", "report")
    assert result.exit_code == 2 and "--readme 'README.md'" in result.stderr and BEGIN in result.stderr
    assert not any(name.startswith("docs") for name in result.files)
    assert "No such file" in run("bench", "report", "--readme", "OTHER.md").stderr


def test_files_that_hold_no_rows_are_one_message(run, place):
    rows = place / "benchmarks" / "results" / "a.jsonl"
    for content, words in {
        bytes(range(256)): "a.jsonl is not text in UTF-8",
        b"[" * 100_000: "a.jsonl:1: no JSON",
        b'{"n": ' + b"9" * 5000 + b"}": "a.jsonl:1: no JSON",
    }.items():
        rows.write_bytes(content)
        report = run("bench", "report")
        added = run("bench", "run", "dit-2b", "--out", "benchmarks/results/a.jsonl", "--device", "cpu")
        for result in (report, added):
            assert result.exit_code == 2 and words in result.stderr and result.stderr.count("error:") == 1
            assert not any(name.startswith("docs") for name in result.files)


def test_a_row_that_no_table_shows_is_one_message(run, place):
    rows = place / "benchmarks" / "results" / "a.jsonl"
    rows.unlink()
    append(rows, row(shapes={}))
    result = run("bench", "report")
    assert result.exit_code == 2 and "--results 'benchmarks/results': has a row that no table shows" in result.stderr
    assert not any(name.startswith("docs") for name in result.files)
