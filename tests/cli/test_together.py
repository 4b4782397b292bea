"""The command on several processes that torchrun starts: one voice, one file, the same video."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from cogvx_fast import ParallelConfig
from cogvx_fast.cli import together
from cogvx_fast.cli.console import UsageError
from tests import toy
from tests.cli.test_tasks import picture, save

FAST = ("--steps", "4", "--dtype", "float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together") / "model"
    toy.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def started(model):
    """Starts the command; what still runs when the test ends is killed."""
    running = []

    def start(out, *options, model=model, processes=2):
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes > 1 else []
        words += ["-m", "cogvx_fast", "generate", "a cat", "--model", model]
        line = [sys.executable, *words, "-o", out, *FAST, *options]
        process = subprocess.Popen(
            list(map(str, line)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.terminate()  # torchrun ends its own, which are in groups of theirs
            process.communicate(timeout=60)


def frames(folder):
    return np.stack([np.asarray(Image.open(path), dtype=np.int16) for path in sorted(folder.glob("*.png"))])


@pytest.mark.slow
def test_two_processes_make_the_video_of_one(model, started, tmp_path):
    alone = subprocess.run(
        [*(sys.executable, "-m", "cogvx_fast", "generate", "a cat", "--model", model, "-o", tmp_path / "one"), *FAST],
        capture_output=True,
        text=True,
        check=False,
    )
    assert alone.returncode == 0, alone.stderr
    preview = tmp_path / "preview.png"
    process = started(tmp_path / "two", "--seed", "0", "--preview", preview, "--sheet", tmp_path / "sheet.png")
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert said.count("wrote") == 2 and said.count("2 processes: guidance 2, vae 2") == 1
    assert np.abs(frames(tmp_path / "one") - frames(tmp_path / "two")).max() <= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "sheet.png", "two"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["5b-i2v", "inp"])
def test_they_begin_with_a_picture(kind, started, tmp_path):
    """Of image-to-video, and of first and last frame; each process reads the pictures."""
    options = []
    for number, option in enumerate(("--image", "--last-image")[: 2 if kind == "inp" else 1]):
        path = tmp_path / f"{number}.png"
        picture(number).save(path)
        options += [option, path]
    model = tmp_path / "model"
    save(kind, model)
    for processes in (1, 2):
        process = started(tmp_path / str(processes), *options, model=model, processes=processes)
        said, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert ("2 processes: guidance 2, vae 2" in said) is (processes == 2)
    assert np.abs(frames(tmp_path / "1") - frames(tmp_path / "2")).max() <= 1


@pytest.mark.slow
def test_what_cannot_work_is_said_once(started, tmp_path):
    process = started(tmp_path / "out", "--parallel", "ulysses=3")
    said, errors = process.communicate(timeout=300)
    assert process.returncode != 0 and not said
    assert errors.count("error: --parallel") == 1 and "must be the number of processes, which is 2" in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_process_that_dies_ends_all(started, tmp_path):
    process = started(tmp_path / "out.gif", "--num-videos", "500")
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("out-*.gif")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    assert len(ranks) == 2
    os.kill(int(ranks[1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=90)
    assert process.returncode != 0 and "SIGKILL" in errors
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("out-")]
    assert not any(os.path.exists(f"/proc/{rank}") for rank in ranks)


@pytest.fixture
def two(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)


def test_degrees(two):
    assert together.degrees(None, 30) == together.degrees("auto", 30) == "auto"
    assert together.degrees("guidance=2,vae=1", 30) == ParallelConfig(guidance=2, vae=1)
    given = "ulysses=2,payload=int8,shard_weights=true"
    assert together.degrees(given, 30) == ParallelConfig(ulysses=2, payload="int8", shard_weights=True)


@pytest.mark.parametrize(
    "text", ["", "two", "ulysses", "ulysses=", "ulysses=x", "ulysses=0", "rows=2", "payload=fp4", "ring=3"]
)
def test_degrees_that_are_none(two, text):
    with pytest.raises(UsageError, match="--parallel"):
        together.degrees(text, 30)
    with pytest.raises(UsageError, match="must divide the transformer's 3 heads"):
        together.degrees("ulysses=2", 3)


def test_one_process_has_no_degrees(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert together.degrees(None, 30) is None and together.company() == together.Company()
    with pytest.raises(UsageError, match="has no effect with one process: start the command with torchrun"):
        together.degrees("auto", 30)


def test_numbers_that_are_none(monkeypatch):
    monkeypatch.setenv("RANK", "first")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="RANK='first'"):
        together.company()
