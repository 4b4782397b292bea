"""Signals that end a command: each like Ctrl-C, with nothing half-written left; and what a kill leaves goes later."""

import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import typer

from cogvx_fast.cli.console import OutputError, exit_codes
from cogvx_fast.cli.interruption import held_back
from tests.signals import heard

ROOT = Path(__file__).parents[2]
# The command, with a model that stands still when it has decoded all: the encoder has written a part of it.
GENERATE = """
import sys, time
from cogvx_fast import FastCogVideoXPipeline
from cogvx_fast.cli import main

decode_stream = FastCogVideoXPipeline.decode_stream

def standing_still(self, *arguments):
    yield from decode_stream(self, *arguments)
    open("at-work", "w").close()
    time.sleep(600)

FastCogVideoXPipeline.decode_stream = standing_still
main()
"""


@pytest.fixture(autouse=True)
def signals():
    with heard():
        yield


def start(code, arguments, folder, **options):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **options)


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        threading.Event().wait(0.05)


def generating(checkpoint, folder, name, **options):
    """The command at work in `folder`."""
    arguments = ["generate", "a cat", "-o", name, "--model", checkpoint, "--steps", 1, "--frames", 81]
    process = start(GENERATE, arguments, folder, **options)
    wait_for(folder / "at-work", process)
    assert [path for path in (folder / name).parent.iterdir() if path.suffix == ".partial"], "it writes"
    return process


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGTERM, "new/out.mp4"), (signal.SIGHUP, "frames"), (signal.SIGINT, "out.mp4")]
)
def test_a_signal_leaves_nothing_half_written(number, name, checkpoint, tmp_path):
    process = generating(checkpoint, tmp_path, name, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for _ in range(2):  # `timeout` tells the process and then its group
        process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "interrupted; videos that were finished are kept" in stderr and "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["at-work"]


@pytest.mark.slow
def test_a_terminal_that_closes_leaves_nothing_half_written(checkpoint, tmp_path):
    terminal, its_end = pty.openpty()
    process = generating(
        checkpoint, tmp_path, "out.mp4", stdin=its_end, stdout=its_end, stderr=its_end, start_new_session=True
    )
    os.close(its_end)
    os.close(terminal)
    process.send_signal(signal.SIGHUP)  # what a shell would do
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    assert [path.name for path in tmp_path.iterdir()] == ["at-work"]


@pytest.mark.slow
def test_the_next_run_sweeps_what_a_kill_left(checkpoint, tmp_path, run):
    here = Path.cwd()
    process = generating(checkpoint, here, "out.mp4", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process.kill()
    process.wait()
    (here / "at-work").unlink()
    assert len(list(here.glob(".*.partial"))) == 1
    result = run("generate", "a cat", "-o", "out.gif", "--model", checkpoint, "--steps", 1)
    assert result.exit_code == 0 and result.files == ["out.gif"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("then", [None, OutputError("a consequence"), OSError("of a terminal that is closed")])
def test_the_status_is_that_of_the_signal(number, then, capfd):
    before = signal.getsignal(number)
    with pytest.raises(typer.Exit) as caught, exit_codes("all is well"):
        try:
            os.kill(os.getpid(), number)
            threading.Event().wait(5)
        finally:
            if then is not None:
                raise then
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) == before
    assert capfd.readouterr().err == "interrupted; all is well\n"


def test_what_must_be_done_whole_is_done_before_a_signal_is_raised():
    done = []
    with pytest.raises(typer.Exit) as caught, exit_codes():
        with held_back():
            with held_back():
                os.kill(os.getpid(), signal.SIGTERM)
                threading.Event().wait(0.1)
                done.append("inner")
            done.append("outer")
        done.append("never")
    assert caught.value.exit_code == 128 + signal.SIGTERM and done == ["inner", "outer"]
    with exit_codes(), held_back():
        pass


def test_it_is_told_to_whom_it_concerns(capfd):
    said = []
    with pytest.raises(typer.Exit) as caught, exit_codes("all is well", said.append):
        raise KeyboardInterrupt
    assert said == ["interrupted; all is well"] and caught.value.exit_code == 130
    assert capfd.readouterr().err == ""


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
    try:
        with exit_codes():
            os.kill(os.getpid(), signal.SIGHUP)
            threading.Event().wait(0.1)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_command_in_another_thread_leaves_signals_alone():
    ended = []

    def command():
        with exit_codes():
            ended.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=command)
    thread.start()
    thread.join()
    assert ended == [signal.SIG_DFL]
