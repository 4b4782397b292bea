"""The long run in short: each kind of fault once, on whole servers. `make soak` is the long one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import client, faults, pool
from .memory import Growth
from .server import Clock
from .users import ACTS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.servers
def test_twenty_five_jobs_survive_each_fault(tmp_path):
    command = [sys.executable, "-m", "tests.soak", "--jobs", "25", "--seed", "1", "--keep", str(tmp_path)]
    command += ["--write", str(tmp_path / "page.md")]
    (tmp_path / "page.md").write_text("before\n<!-- soak: begin -->\n<!-- soak: end -->\nbehind\n")
    paths = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("before\n") and page.endswith("behind\n")
    left_out = page.partition("Left out: ")[2]
    for name in faults.PER_THOUSAND:
        assert f"| {name} | 1 |" in page or name in left_out
    assert "| **lost** | **0** |" in page


def test_the_schedule_has_each_fault_and_leaves_the_end_in_peace():
    for jobs in (25, 1000):
        planned = faults.schedule(jobs, 1, list(faults.PER_THOUSAND))
        assert {name for _, name in planned} == set(faults.PER_THOUSAND)
        numbers = [number for number, _ in planned]
        assert numbers == sorted(numbers) and numbers[-1] < faults.LATEST * jobs
        assert planned == faults.schedule(jobs, 1, list(faults.PER_THOUSAND)) != faults.schedule(jobs, 2, ["full disk"])
    assert faults.schedule(1000, 1, []) == [], "in peace"
    assert sum(ACTS.values()) < 100


def test_settings_differ_and_go_on_from_some_that_stand_before_them():
    found = pool.settings(40, 1)
    assert [setting.seed for setting in found] == list(range(40))
    derived = [setting for setting in found if setting.source is not None]
    assert len(derived) == 12 and all(setting.source in found[: setting.seed] for setting in derived)
    assert {setting.remix for setting in derived} == {True, False}
    assert len({str(setting.fields) for setting in found if setting.source is None}) > 20
    first, other = found[0], found[9]
    first.id, first.video = "video_1", b"MP4"
    other.source = first
    assert other.body["input_reference"]["video_url"].endswith("TVA0") and other.path == "/v1/videos"
    assert found[7].path.endswith("/remix") and found[7].body["seed"] == 7


def test_growth_is_judged_by_what_a_thousand_jobs_would_add():
    assert Growth("worker", 1000 * 2**20, 50 * 2**10, 300).is_flat
    assert not Growth("worker", 1000 * 2**20, 60 * 2**10, 300).is_flat
    assert Growth("worker", 1000 * 2**20, -1.0, 300).is_flat
    verdicts = [
        Growth("server", 1000 * 2**20, a_job * 2**10, jobs).verdict for a_job, jobs in ((60, 300), (60, 900), (1, 900))
    ]
    assert verdicts == ["too short to be judged", "GROWS", "flat"]


def test_a_clock_that_jumps_is_one_of_other_processes(tmp_path):
    clock = Clock(tmp_path / "clock")
    code = "import time; print(time.time()); input(); print(time.time())"
    paths = str(ROOT / "tests" / "soak" / "clock")
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths, "SOAK_CLOCK": str(clock.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    first = float(process.stdout.readline())
    clock.jump(-3600.0)
    said, _ = process.communicate("\n")
    assert float(said) - first == pytest.approx(-3600, abs=60)


def test_nobody_there_is_said_to_be_unreachable():
    with pytest.raises(client.Unreachable):
        client.request(9, "GET", "/")
