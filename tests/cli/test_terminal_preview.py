"""`--terminal-preview`: where pictures are drawn while a bar moves, that nothing else is touched, and that they go."""

import contextlib
import fcntl
import io
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from cogvx_fast.cli import terminal_preview
from cogvx_fast.cli.console import UsageError
from cogvx_fast.cli.graphics import Graphics
from cogvx_fast.cli.terminal_preview import TerminalPreview
from tests.signals import heard

from . import terminal
from .test_interruption import ROOT

PICTURES = torch.randint(0, 255, (1, 5, 4, 2, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
HEIGHT, WIDTH = 30, 80


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture(autouse=True)
def cells(monkeypatch):
    monkeypatch.setattr(terminal_preview, "cell_size", lambda: (8, 16))


@contextlib.contextmanager
def bars(graphics=Graphics.kitty, height=HEIGHT, number=1):
    """A progress display on a terminal that keeps what is written, and the previews above it."""
    file, clock = io.StringIO(), Clock()
    console = Console(file=file, force_terminal=True, force_interactive=True, width=WIDTH, height=height)
    with Progress(console=console, auto_refresh=False) as progress:
        for index in range(number):
            progress.add_task(f"video {index}")
        preview = TerminalPreview(graphics, progress, clock)

        def show():
            clock.now += 1
            preview.show(PICTURES)
            return terminal.Screen(height).read(file.getvalue())

        preview.written, preview.draw = file.getvalue, show
        with preview.there():
            yield preview, progress


def texts(screen):
    return [line.rstrip() for line in screen.lines if line.strip()]


@pytest.mark.parametrize("graphics", Graphics)
@pytest.mark.parametrize("number", [1, 3])
def test_pictures_are_drawn_over_each_other_above_the_bars(graphics, number):
    with bars(graphics, number=number) as (preview, progress):
        for step in range(4):
            progress.update(0, completed=step, refresh=True)
            screen = preview.draw()
        rows = preview._place[1]
        assert screen.pictures == [(0, 0)] * 4 and rows == 12
        assert [line.startswith("video") for line in screen.lines] == [False] * rows + [True] * number
        progress.add_task("one more", start=True)
        progress.refresh()
        screen = preview.draw()
        assert screen.pictures[-1] == (0, 0) and screen.lines[-1].startswith("one more")
        assert len(screen.lines) == rows + number + 1
    final = terminal.Screen(HEIGHT).read(preview.written())
    assert final.lines[0].startswith("video 0") and len(texts(final)) == number + 1, "as if there had been none"


def test_the_picture_is_the_beginning_middle_and_end():
    large = torch.randint(0, 255, (2, 7, 64, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    strip = np.asarray(terminal_preview.side_by_side(large))
    assert strip.shape == (64, 3 * 96 + 2 * 2, 3)
    for index, frame in enumerate((0, 3, 6)):
        assert np.array_equal(strip[:, index * 98 : index * 98 + 96], large[0, frame].numpy())
    assert not strip[:, 96:98].any()
    with bars() as (preview, _):
        preview._clock.now += 1
        preview.show(large)
    assert np.array_equal(np.asarray(terminal.kitty(preview.written())[0][1]), strip)


@pytest.mark.parametrize(("length", "width"), [(1, 64), (2, 130), (3, 196)])
def test_of_short_clips_there_are_fewer_and_small_ones_are_enlarged(length, width):
    strip = terminal_preview.side_by_side(PICTURES[:, :length])
    frame = Image.fromarray(PICTURES[0, 0].numpy()).resize((64, 128), Image.Resampling.BICUBIC)
    assert strip.size == (width, 128) and np.array_equal(np.asarray(strip)[:, :64], np.asarray(frame))


def test_it_is_drawn_once_a_second():
    with bars() as (preview, _):
        preview.draw()
        before = preview.written()
        preview._clock.now += 0.9
        preview.show(PICTURES)
        assert preview.written() == before
        preview._clock.now += 0.1
        preview.show(PICTURES)
        assert preview.written() != before


def test_what_takes_long_to_draw_is_drawn_less_often(monkeypatch):
    with bars() as (preview, _):
        shown = terminal_preview.shown

        def slowly(*arguments):
            preview._clock.now += 0.19
            return shown(*arguments)

        monkeypatch.setattr(terminal_preview, "shown", slowly)
        drawn = [len(preview.draw().pictures) for _ in range(9)]
    assert drawn == [1, 1, 1, 1, 2, 2, 2, 2, 3], "0.19 of 3.8 seconds"


def test_a_message_in_between_stays_and_the_next_picture_is_below_it():
    with bars() as (preview, progress):
        preview.draw()
        progress.console.print("warning: something")
        screen = preview.draw()
        assert screen.pictures == [(0, 0), (13, 0)]
        assert preview.draw().pictures[-1] == (13, 0)
    final = terminal.Screen(HEIGHT).read(preview.written())
    assert texts(final)[0] == "warning: something" and texts(final)[1].startswith("video 0")
    assert [found["a"] for found, _ in terminal.kitty(preview.written())] == ["T", "T", "T", "d"]


def test_it_scrolls_with_what_stands_above():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, force_interactive=True, width=WIDTH, height=16)
    for index in range(40):
        console.print(f"line {index}")
    with Progress(console=console, auto_refresh=False) as progress:
        progress.add_task("video")
        preview = TerminalPreview(Graphics.iterm2, progress, clock := Clock())
        with preview.there():
            for _ in range(3):
                clock.now += 1
                preview.show(PICTURES)
            assert terminal.Screen(16).read(file.getvalue()).pictures == [(40, 0)] * 3
    assert texts(terminal.Screen(16).read(file.getvalue()))[:40] == [f"line {index}" for index in range(40)]


def test_a_small_terminal_shows_smaller_ones_or_none():
    with bars(height=12) as (preview, _):
        preview.draw()
        assert preview._place[1] == 9
    with bars(height=6, number=2) as (preview, _):
        assert preview.draw().pictures == [] and terminal.kitty(preview.written()) == []


def test_more_bars_leave_less_room():
    with bars(height=16) as (preview, progress):
        assert preview.draw().pictures == [(0, 0)]
        for index in range(3):
            progress.add_task(f"more {index}")
        progress.refresh()
        screen = preview.draw()
        assert preview._place[1] == 10 and screen.lines[10].startswith("video 0") and len(screen.lines) == 14
        for index in range(8):
            progress.add_task(f"still more {index}")
        progress.refresh()
        assert texts(preview.draw())[0].startswith("video 0") and preview._place is None


def test_a_terminal_of_another_size_gets_a_new_place(monkeypatch):
    with bars() as (preview, progress):
        preview.draw()
        progress.console.width = 60
        assert preview.draw().pictures == [(0, 0), (12, 0)]


def test_ctrl_c_leaves_the_bar_alone():
    with pytest.raises(KeyboardInterrupt), bars() as (preview, _):
        preview.draw()
        raise KeyboardInterrupt
    final = terminal.Screen(HEIGHT).read(preview.written())
    assert final.lines[0].startswith("video 0") and terminal.kitty(preview.written())[-1][0]["a"] == "d"


@pytest.mark.parametrize(
    ("size", "cell", "columns", "rows", "expected"),
    [
        ((90, 60), (8, 16), 200, 12, (36, 12)),
        ((90, 60), (10, 20), 200, 12, (36, 12)),
        ((90, 60), (8, 8), 200, 12, (18, 12)),
        ((270, 60), (8, 16), 79, 12, (72, 8)),
        ((60, 90), (8, 16), 79, 12, (16, 12)),
        ((900, 10), (8, 16), 79, 12, None),
        ((90, 60), (8, 16), 79, 2, None),
        ((90, 60), (8, 16), 0, 12, None),
    ],
)
def test_as_large_as_there_is_room_for_and_of_its_shape(size, cell, columns, rows, expected):
    assert terminal_preview.cells(Image.new("RGB", size), cell, columns, rows) == expected


@contextlib.contextmanager
def terminals(rows=24, columns=80, width=0, height=0):
    """Both ends of a terminal of so many cells and pixels."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, width, height))
    try:
        yield ours, theirs
    finally:
        for end in (ours, theirs):
            with contextlib.suppress(OSError):
                os.close(end)


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [((0, 0), (8, 16)), ((800, 480), (10, 20)), ((805, 481), (10, 20)), ((10, 480), (8, 16))],
)
def test_the_kernel_knows_how_large_a_cell_is(pixels, expected, monkeypatch):
    monkeypatch.undo()
    with terminals(24, 80, *pixels) as (_, theirs), os.fdopen(os.dup(theirs), "w") as file:
        monkeypatch.setattr(sys, "__stderr__", file)
        assert terminal_preview.cell_size() == expected


@pytest.mark.parametrize("error", [None, io.StringIO()])
def test_without_a_terminal_cells_are_of_a_usual_size(error, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(sys, "__stderr__", error)
    assert terminal_preview.cell_size() == (8, 16)


@pytest.mark.parametrize(
    ("environment", "option", "expected"),
    [
        ({"TERM": "xterm-kitty"}, "auto", Graphics.kitty),
        ({"TERM": "xterm-kitty"}, "off", None),
        ({"TERM": "xterm-256color"}, "auto", None),
        ({"TERM": "xterm-256color"}, "sixel", Graphics.sixel),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux-0/default,1,0"}, "auto", None),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux-0/default,1,0"}, "kitty", Graphics.kitty),
    ],
)
def test_in_a_terminal_the_option_decides_or_the_environment(environment, option, expected, monkeypatch):
    with terminals() as (ours, theirs), os.fdopen(os.dup(theirs), "w") as file:
        monkeypatch.setattr(os, "environ", environment)
        monkeypatch.setattr(sys, "stderr", file)
        monkeypatch.setattr(terminal_preview, "messages", Console(stderr=True))
        assert terminal_preview.choose(option) is expected
        assert not select.select([ours], [], [], 0)[0], "the terminal is not asked"


def test_where_nobody_sees_pictures_there_are_none(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-kitty")
    monkeypatch.setenv("FORCE_COLOR", "1")  # that some CI systems set, for which rich takes any file for a terminal
    for option in ("auto", "off"):
        assert terminal_preview.choose(option) is None
    with pytest.raises(UsageError, match="--terminal-preview 'kitty': needs a terminal"):
        terminal_preview.choose("kitty")


# With steps as long steps that there is more than one picture, and time to interrupt it.
SLOW = """
import time
from cogvx_fast import FastCogVideoXPipeline
from cogvx_fast.cli import main

call = FastCogVideoXPipeline.__call__

def slowly(self, *, callback_on_step_end, **arguments):
    def slow(*args):
        time.sleep(0.6)
        return callback_on_step_end(*args)
    return call(self, callback_on_step_end=slow, **arguments)

FastCogVideoXPipeline.__call__ = slowly
main()
"""


def in_terminal(arguments, folder, until=None, **variables):
    """The exit status of the command on a terminal, and what it wrote there; what was typed ahead it must leave there.

    Args:
        until: words of the terminal at which Ctrl-C is pressed.
    """
    clean = {name: value for name, value in os.environ.items() if name not in ("CI", "TMUX", "STY", "FORCE_COLOR")}
    environment = clean | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "PYTHONUNBUFFERED": "1", **variables}
    with terminals(30, 100, 1000, 600) as (ours, theirs), heard():
        os.write(ours, b"typed ahead\n")
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW, *map(str, arguments)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=folder,
            env=environment,
        )
        try:
            written, end = b"", time.monotonic() + 120
            while True:
                ready, _, _ = select.select([ours], [], [], 0.05)
                if ready:
                    written += os.read(ours, 65536)
                elif process.poll() is not None:
                    break
                assert time.monotonic() < end, written
                if until is not None and until in written:
                    process.send_signal(signal.SIGINT)
                    until = None
            typed = os.read(theirs, 100) if select.select([theirs], [], [], 0)[0] else b""
        finally:
            process.kill()
            process.wait()
    assert typed == b"typed ahead\n", "nothing was read of what people type"
    return process.returncode, written.decode().replace("\r\n", "\n")


def order(checkpoint, *more):
    return ["generate", "a cat", "-o", "a.gif", "--model", checkpoint, "--steps", 3, "--dtype", "float32", *more]


@pytest.mark.slow
def test_a_terminal_shows_what_is_being_made(checkpoint, tmp_path):
    status, written = in_terminal(order(checkpoint), tmp_path, TERM="xterm-kitty")
    assert status == 0 and [path.name for path in tmp_path.iterdir()] == ["a.gif"]
    assert len([found for _, found in terminal.kitty(written) if found]) >= 2 and "wrote a.gif" in written
    screen = terminal.Screen(30).read(written.partition("typed ahead\n")[2])
    assert len(set(screen.pictures)) == 1, "all in one place"
    assert [line.split()[0] for line in texts(screen)][:2] == ["done", "wrote"], "and gone"


@pytest.mark.slow
def test_ctrl_c_takes_the_picture_away(checkpoint, tmp_path):
    status, written = in_terminal(order(checkpoint), tmp_path, until=b"\x1b_G", TERM="xterm-kitty")
    assert status == 130 and list(tmp_path.iterdir()) == []
    assert terminal.kitty(written)[-1][0]["a"] == "d"
    left = texts(terminal.Screen(30).read(written.partition("typed ahead\n")[2]))
    assert left[0].startswith("denoise") and left[1].startswith("interrupted")


@pytest.mark.slow
def test_nothing_is_written_where_standard_error_is_no_terminal(run, checkpoint, calls, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-kitty")
    monkeypatch.setattr(terminal_preview, "messages", Console(stderr=True, force_terminal=True))  # as by FORCE_COLOR
    result = run(*order(checkpoint))
    assert result.exit_code == 0 and "\x1b" not in result.stderr and "preview" not in calls[0]


def test_asking_for_pictures_without_a_terminal_is_an_error(run, checkpoint):
    result = run("generate", "a cat", "--model", checkpoint, "--terminal-preview", "sixel")
    assert result.exit_code == 2 and "--terminal-preview 'sixel': needs a terminal" in " ".join(result.stderr.split())


@pytest.mark.slow
def test_a_map_that_cannot_be_fitted_ends_nothing(run, checkpoint, monkeypatch):
    def fails(_):
        raise ValueError("numbers that are not finite")

    monkeypatch.setattr(terminal_preview, "choose", lambda _: Graphics.kitty)
    monkeypatch.setattr("cogvx_fast.preview.fitted", fails)
    result = run("generate", "a cat", "-o", "a.gif", "--model", checkpoint, "--steps", 1)
    assert result.exit_code == 0 and "no pictures in the terminal: numbers that are not finite" in result.stderr
