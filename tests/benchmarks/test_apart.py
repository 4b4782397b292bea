"""What two processes lose to each other, rehearsed: it runs, and says what it is of."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "parallel" / "apart.py"


def apart(*arguments, processes):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    return subprocess.run([*command, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_a_rehearsal():
    done = apart("vae-full", "--toy", processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    said = re.findall(r"^(.+): ([0-9.]+) s, ([0-9.]+) of the halves$", done.stdout, re.M)
    assert [name for name, *_ in said] == ["one process", "2 bands", "2 halves apart"]
    assert float(said[-1][2]) == 1.0


@pytest.mark.slow
def test_one_process_has_nobody_to_lose_to():
    done = apart(processes=1)
    assert done.returncode != 0 and "1 processes; must be 2" in done.stderr
