"""What `bench serve` is asked for: plans, refusals and rows; no server is started."""

import pytest

from cogvx_fast.bench import serving_run
from cogvx_fast.bench.report import BEGIN, END
from cogvx_fast.bench.results import append, read
from cogvx_fast.bench.serving_clients import RequestError
from tests.bench.conftest import row
from tests.bench.test_serving import ROWS, serving_row


@pytest.fixture
def made(monkeypatch):
    """Replaces the run: the plans that it was given, and the rows that it makes."""
    plans, rows = [], list(ROWS)

    def fake(plan, sink, tell):
        plans.append(plan)
        for one in rows:
            sink(one)
        return rows

    monkeypatch.setattr(serving_run, "run", fake)
    return plans, rows


def test_a_running_server_is_asked_and_its_key_is_told_to_nobody(run, made, tmp_path):
    options = ("--rate", "2,0.5", "--duration", 3, "--url", "http://host:1/v1/", "--key", "secret", "--steps", 4)
    result = run("bench", "serve", *options, "--size", "48x32", "--frames", 9, "--guidance", 1)
    assert result.exit_code == 0, result.stderr
    (plan,) = made[0]
    assert (plan.rates, plan.seconds, plan.patience, plan.url, plan.key) == (
        [0.5, 2.0],
        3,
        3,
        "http://host:1",
        "secret",
    )
    assert plan.request(1) == {
        **{"prompt": plan.request(1)["prompt"], "seed": 1, "width": 48, "height": 32, "num_frames": 9},
        **{"num_inference_steps": 4, "guidance_scale": 1.0, "fps": 8},
    }
    assert "secret" not in plan.command and "--rate 2,0.5 --duration 3 --url http://host:1/v1/" in plan.command
    assert "30 sent, 30 ended, 0 errors, 0 open; done p50 600 ms, p95 600 ms" in result.stdout
    assert "the target of at most 0.50x is reached" in result.stdout
    assert len(read(tmp_path / "here" / "benchmarks" / "results" / "serving.jsonl")) == 4


def test_servers_are_started_by_the_rules_of_serve(run, made, tmp_path):
    baseline = tmp_path / "baseline.py"
    baseline.write_text("")
    result = run("bench", "serve", "--baseline", baseline, "--load", "0.5,1", "--patience", 9, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    (plan,) = made[0]
    assert plan.model.endswith("demo") and (plan.dtype, plan.device, plan.baseline) == ("float32", "cpu", baseline)
    assert (plan.rates, plan.loads, plan.seconds, plan.patience) == (None, [0.5, 1.0], 60.0, 9.0)


def test_a_red_gate_fails(run, made):
    made[1][:] = [serving_row("ours", 0.2, 1.0, gate="red")]
    result = run("bench", "serve", "--device", "cpu")
    assert result.exit_code == 1 and "no latency is stated, for: ours" in result.stderr
    assert "REFUSED, mean over 3 inputs" in result.stdout


def test_a_server_that_does_not_answer_is_one_message(run, monkeypatch):
    def fail(*_):
        raise RequestError("http://host is no server of videos")

    monkeypatch.setattr(serving_run, "run", fail)
    result = run("bench", "serve", "--url", "http://host")
    assert result.exit_code == 1 and "error: http://host is no server of videos" in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--rate", "0"), "--rate '0': must be numbers above 0"),
        (("--rate", "1,x"), "--rate '1,x': must be numbers"),
        (("--load", "nan"), "--load 'nan': must be numbers"),
        (("--rate", "1e9"), "--rate 1e9: is more than 100,000 requests"),
        (("--duration", "0"), "--duration 0.0: must be a number of seconds above 0"),
        (("--patience", "inf"), "--patience inf: must be"),
        (("--url", "host:8000"), "--url 'host:8000': must begin with http"),
        (("--url", "http://host", "--baseline", "x.py"), "--baseline: cannot be combined with --url"),
        (("model", "--url", "http://host"), "MODEL: cannot be combined with --url"),
        (("--baseline", "none.py"), "--baseline 'none.py': is no file"),
        (("--size", "64"), "--size '64': must be WIDTHxHEIGHT"),
        (("--size", "9" * 5000 + "x64"), "must be WIDTHxHEIGHT"),
        (("--steps", "0"), "--steps 0: must be at least 1"),
        (("--frames", "0"), "--frames 0: must be at least 1"),
        (("--guidance", "nan"), "--guidance nan: must be a number"),
        (("--out", "rows.txt"), "--out 'rows.txt': must end in .jsonl"),
    ],
)
def test_what_cannot_work_is_refused_before_any_server(run, made, options, words):
    result = run("bench", "serve", *options)
    assert result.exit_code == 2 and words in result.stderr and not made[0] and not result.files


def test_the_report_rewrites_the_page_about_serving_where_there_are_rows(run, tmp_path):
    pytest.importorskip("matplotlib")
    here, page = tmp_path / "here", tmp_path / "here" / "docs" / "serving.md"
    (here / "README.md").write_text(f"# Name\n{BEGIN}\n{END}\n")
    append(here / "benchmarks" / "results" / "a.jsonl", row())
    assert run("bench", "report").exit_code == 0 and not page.exists()
    for one in ROWS:
        append(here / "benchmarks" / "results" / "serving.jsonl", one)
    result = run("bench", "report")
    assert result.exit_code == 2 and "--serving 'docs/serving.md'" in result.stderr
    page.write_text(f"# Serving\n{BEGIN}\n{END}\nthe end\n")
    assert run("bench", "report", "--check").exit_code == 1
    assert "docs/serving.md" in run("bench", "report").stdout
    text = page.read_text()
    assert "| 0.5/s | baseline | 30 |" in text and "](benchmarks/serving-demo-bfloat16-serving-some-cpu-r.png)" in text
    assert (
        text.endswith(f"{END}\nthe end\n")
        and "README.md and docs/serving.md match 5 rows" in run("bench", "report", "--check").stdout
    )
