"""`cogvx-fast calibrate`, and engine turbo of `generate`: one writes what the other takes, and bad input is named."""

import json

import pytest

from cogvx_fast import machine
from cogvx_fast.cli import calibrate, loading

SIZE = ["--frames", "9", "--height", "32", "--width", "32"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\na dog\na bird\n")
    return path


@pytest.mark.slow
def test_what_it_writes_generate_takes(run, checkpoint, prompts, tmp_path, monkeypatch):
    out = tmp_path / "s.json"
    line = ["calibrate", str(checkpoint), "--prompts", str(prompts), "--out", str(out), "--steps", "10", *SIZE]
    result = run(*line, "--dtype", "float32")
    assert result.exit_code == 0, result.stderr
    assert "evaluations of the network: about" in result.stderr
    assert "dB" in result.stdout and "#" in result.stdout and f"wrote {out}" in result.stdout
    assert not list(tmp_path.glob("*.parts"))
    assert json.loads(out.read_text())["found"]["prompts"] == 2
    made = ["generate", "a cat", "--model", str(checkpoint), "-o", str(tmp_path / "a.mp4"), *SIZE, "--dtype", "float32"]
    turbo = ["--engine", "turbo", "--schedule", str(out)]
    result = run(*made, *turbo, "--speed", "quality", "--steps", "10")
    assert result.exit_code == 0, result.stderr
    assert "5 of 10 computed" in result.stdout
    result = run(*made, *turbo, "--steps", "20")
    assert "10 of 20 computed" in result.stdout


@pytest.mark.slow
def test_one_that_was_stopped_goes_on(run, checkpoint, prompts, tmp_path, monkeypatch):
    out = tmp_path / "s.json"
    line = ["calibrate", str(checkpoint), "--prompts", str(prompts), "--out", str(out), "--steps", "10", *SIZE]
    with monkeypatch.context() as patch:
        patch.setattr("cogvx_fast.turbo.files.ScheduleFile.write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        result = run(*line)
    assert result.exit_code == 130 and "with --resume goes on" in result.stderr
    assert len(list((tmp_path / "s.json.parts").iterdir())) > 3 and not out.exists()
    result = run(*line)
    assert result.exit_code == 2 and "a calibration was stopped there: --resume goes on" in result.stderr
    result = run(*line, "--resume", "--seed", "5")
    assert result.exit_code == 2 and "what was stopped had another seed" in result.stderr
    result = run(*line, "--resume")
    assert result.exit_code == 0 and out.exists(), result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "9"], "--steps 9: must be 10 to 1000"),
        (["--guidance", "0.5"], "--guidance 0.5"),
        (["--out", "s.txt"], "--out 's.txt': must end in .json"),
        (["--out", "/proc/s.json"], "--out '/proc/s.json': cannot be written"),
        (["--out", ""], "--out '.': must end in .json"),
        (["--out", "/"], "--out '/': must end in .json"),
        (["--out", f"{'a' * 300}.json"], "cannot be written (File name too long)"),
        (["--out", f"{'a' * 248}.json"], "cannot be written (File name too long)"),
        (["--frames", "10"], "--frames 10"),
        (["--seed", "-1"], "--seed -1"),
    ],
)
def test_bad_input_is_named(run, checkpoint, prompts, options, message):
    result = run("calibrate", str(checkpoint), "--prompts", str(prompts), *options)
    assert result.exit_code == 2 and message in result.stderr, result.stderr


def test_too_few_prompts_and_no_model_are_named(run, checkpoint, tmp_path):
    result = run("calibrate", str(checkpoint), "--prompts", "none.txt")
    assert result.exit_code == 2 and "error: --prompts 'none.txt': cannot be read" in result.stderr
    few = tmp_path / "few.txt"
    few.write_text("a cat\n")
    result = run("calibrate", str(checkpoint), "--prompts", str(few))
    assert result.exit_code == 2 and "has 1; must have at least 3" in result.stderr
    few.write_text("a\nb\nc\n")
    result = run("calibrate", "no/such/model", "--prompts", str(few))
    assert result.exit_code == 2 and "MODEL 'no/such/model'" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "turbo"], "--engine 'turbo': tier 'turbo' needs a schedule of the very checkpoint"),
        (
            ["--engine", "turbo", "--schedule", "none.json"],
            "--schedule 'none.json': schedule 'none.json' cannot be read",
        ),
        (["--engine", "turbo", "--speed", "0.5"], "--speed 0.5: EngineConfig.speed=0.5 must be a number from 1 to 100"),
        (["--engine", "turbo", "--speed", "warp"], "--speed 'warp'"),
        (["--speed", "2.5"], "--speed 2.5: EngineConfig.speed=2.5 must be left at 2.0: only tier 'turbo' has it"),
        (["--schedule", "s.json"], "only tier 'turbo' has it"),
    ],
)
def test_generate_names_what_turbo_cannot_do(run, checkpoint, options, message):
    result = run("generate", "a cat", "--model", str(checkpoint), *options)
    assert result.exit_code == 2 and message in result.stderr, result.stderr


def test_the_demo_has_its_own_schedules(run, tmp_path):
    options = ["--engine", "turbo", "--steps", "6", "--speed", "2"]
    result = run("generate", "a red circle", *options, "-o", str(tmp_path / "a.mp4"))
    assert result.exit_code == 2 and "--steps 6: speed=2.0 of num_inference_steps=6 leaves 3" in result.stderr


@pytest.mark.parametrize("value", [8_000_000_001, "8" + "0" * 308 + "1"])
def test_a_size_that_memory_does_not_hold_is_refused_before_weights_are_read(run, checkpoint, prompts, value):
    order = ("calibrate", checkpoint, "--prompts", prompts, "--steps", 10, "--device", "cpu")
    result = run(*order, "--frames", value)
    assert result.exit_code == 2 and not result.files
    assert f"error: --frames {value}: needs more than" in result.stderr or "are free; what fits" in result.stderr


def test_memory_that_runs_out_is_one_line(run, checkpoint, prompts, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: 4 TB")

    monkeypatch.setattr(loading, "load_pipeline", fail)
    result = run("calibrate", checkpoint, "--prompts", prompts, "--steps", 10)
    assert (
        result.exit_code == 1 and "error: cpu ran out of memory at 9 frames of 32x32; lower --frames" in result.stderr
    )
    monkeypatch.setattr(machine, "free_memory", lambda: 1)
    result = run("calibrate", checkpoint, "--prompts", prompts, "--steps", 10, "--out", "other.json")
    assert result.exit_code == 2 and f"error: MODEL '{checkpoint}': needs " in result.stderr


@pytest.mark.parametrize("content", ["[]", "3", "{", "[" * 100_000])
def test_broken_settings_of_one_that_was_stopped_are_named(run, checkpoint, prompts, tmp_path, content):
    parts = tmp_path / "s.json.parts"
    parts.mkdir()
    (parts / "settings.json").write_text(content)
    result = run("calibrate", checkpoint, "--prompts", prompts, "--steps", 10, "--out", tmp_path / "s.json", "--resume")
    assert result.exit_code == 2 and "what was stopped had another model; remove" in result.stderr


def test_hours_are_said_as_such():
    assert calibrate._duration(7200) == "about 2.0 h, and decoding"
    assert calibrate._duration(90) == "about 90 s, and decoding"
