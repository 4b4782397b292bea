"""Kills at any moment: nothing half-written under its own name, and the next run makes what an undisturbed one does."""

import hashlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import toy
from tests.signals import heard

from .harness import allowed, count, examples, limited

COMMAND = [sys.executable, "-c", "from cogvx_fast.cli import main; main()"]
SMALL = ["--steps", "2", "--frames", "9", "--height", "32", "--width", "32"]
GENTLE = {signal.SIGTERM, signal.SIGHUP, signal.SIGINT}

pytestmark = pytest.mark.slow


def contents(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def line(what, model, out):
    if what == "quantize":
        return [*COMMAND, "quantize", str(model), str(out / "int8")]
    return [*COMMAND, "generate", "a cat", "--model", str(model), "-o", str(out / "frames"), *SMALL]


def run(arguments):
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(autouse=True)
def signals():
    with heard():
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The model, what each command makes of it, and how long that takes."""
    folder = tmp_path_factory.mktemp("kills")
    toy.pipeline().save_pretrained(folder / "model")
    found = {}
    for what in ("quantize", "generate"):
        (folder / what).mkdir()
        started = time.monotonic()
        run(line(what, folder / "model", folder / what))
        found[what] = contents(folder / what), time.monotonic() - started
    return folder / "model", found


@examples(2)
@given(
    what=st.sampled_from(["quantize", "generate"]),
    number=st.sampled_from([signal.SIGKILL, *sorted(GENTLE)]),
    place=st.floats(0.2, 1.0),
)
def test_a_kill(undisturbed, what, number, place):
    model, found = undisturbed
    expected, seconds = found[what]
    out = Path(tempfile.mkdtemp())
    try:
        with limited():
            process = subprocess.Popen(
                line(what, model, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            time.sleep(seconds * place)
            process.send_signal(number)
            _, said = process.communicate(timeout=allowed(30))
        assert "Traceback" not in said, said
        left = contents(out)
        assert all(expected[name] == content for name, content in left.items() if name in expected), "half-written"
        if number in GENTLE:
            assert process.returncode in (0, 128 + number, -number), (process.returncode, said)
            if what == "generate":
                assert left in ({}, expected), f"left {sorted(left)}"
        with limited():
            if not (what == "generate" and left == expected) and not (out / "int8" / "quantization.json").exists():
                run(line(what, model, out))
        assert contents(out) == expected
        count("kills", "done" if process.returncode == 0 else "ended and made again")
    finally:
        shutil.rmtree(out)
