"""The steps for the first GPU, rehearsed on a CPU at toy size: they run, and say what they are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["right", "demo", "attention", "dit", "vae", "8bit", "profile", "whole"]


def first_gpu(*arguments):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, str(ROOT / "benchmarks" / "first_gpu.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("step", NAMES)
def test_a_rehearsal(step, tmp_path):
    out = tmp_path / "rows.jsonl"
    done = first_gpu(NAMES.index(step) + 1, "--rehearse", "--out", out)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    table = done.stdout[done.stdout.index(f"== {step} on ") :]
    assert "a rehearsal on a CPU: times say nothing" in table
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows and all(row["rehearsal"] and row["step"] == step for row in rows)
    assert all(row["name"][:30] in table and row["machine"]["device"] == "cpu" for row in rows)


@pytest.mark.slow
def test_steps_are_listed_and_unknown_ones_refused():
    listed = first_gpu("list").stdout.splitlines()
    assert [line.split()[:2] for line in listed] == [[str(n), name] for n, name in enumerate(NAMES, 1)]
    unknown = first_gpu("nine")
    assert unknown.returncode == 2 and "step='nine' is unknown; allowed: list, all, right" in unknown.stderr
    assert "--minutes=0.0 must be positive" in first_gpu("right", "--minutes", "0").stderr
