"""Pictures for terminals: which are known to show them, and that what is written is the picture."""

import numpy as np
import pytest
from PIL import Image

from cogvx_fast.cli import sixel
from cogvx_fast.cli.graphics import Graphics, detect, removed, shown

from . import terminal


def picture(height=60, width=90):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-kitty", "TERM_PROGRAM": "vscode"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1", "TERM_PROGRAM": "vscode"}, None),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "other"}, None),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "xterm", "TERM_PROGRAM": "mintty"}, "iterm2"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "foot-extra", "KITTY_WINDOW_ID": "1"}, "sixel"),
        ({"TERM": "mlterm-256color"}, "sixel"),
        ({"TERM": "contour"}, "sixel"),
        ({"TERM": "xterm-256color", "KONSOLE_VERSION": "220400"}, "sixel"),
        ({"TERM": "xterm-256color", "KONSOLE_VERSION": "211200"}, None),
        ({"TERM": "xterm-256color", "KONSOLE_VERSION": "new"}, None),
        ({"TERM": "xterm-256color"}, None),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "Apple_Terminal"}, None),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "vscode"}, None),
        ({"TERM": "linux"}, None),
        ({}, None),
        ({"TERM": "dumb", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "screen-256color", "LC_TERMINAL": "iTerm2"}, None),
        *(({"TERM": "xterm-kitty", name: "1"}, None) for name in ("TMUX", "STY", "ZELLIJ", "NVIM", "VIM_TERMINAL")),
        *(({"TERM": "xterm-kitty", name: "1"}, None) for name in ("INSIDE_EMACS", "CI")),
        ({"TERM": "xterm-kitty", "TMUX": "", "CI": ""}, "kitty"),
    ],
)
def test_the_environment_decides(environment, expected):
    assert detect(environment) == expected


def test_kitty_gets_the_picture_in_pieces():
    text = shown(Graphics.kitty, picture(), 20, 5, (8, 16), 77)
    ((keys, found),) = terminal.kitty(text)
    assert np.array_equal(found, picture()) and text.count("\x1b_G") > 2
    # a=T: send and show, f=100: PNG, C=1: the cursor stays, q=2: no answer, which would be typed text.
    assert keys == {"a": "T", "f": "100", "i": "77", "c": "20", "r": "5", "C": "1", "q": "2", "m": "1"}


def test_kittys_small_picture_is_one_piece():
    text = shown(Graphics.kitty, Image.new("RGB", (4, 4)), 2, 1, (8, 16), 1)
    ((keys, found),) = terminal.kitty(text)
    assert keys["m"] == "0" and found.size == (4, 4) and text.count("\x1b_G") == 1


def test_kittys_picture_is_deleted_by_its_number_and_the_others_go_with_their_cells():
    assert terminal.kitty(removed(Graphics.kitty, 77)) == [({"a": "d", "d": "I", "i": "77", "q": "2"}, None)]
    assert removed(Graphics.iterm2, 77) == removed(Graphics.sixel, 77) == ""


def test_iterm2_gets_the_picture():
    text = shown(Graphics.iterm2, picture(), 20, 5, (8, 16), 77)
    ((keys, found),) = terminal.iterm2(text)
    assert np.array_equal(found, picture()) and text.startswith("\x1b]1337;File=") and text.endswith("\a")
    assert {name: keys[name] for name in ("inline", "width", "height")} == {"inline": "1", "width": "20", "height": "5"}


@pytest.mark.parametrize(("height", "width"), [(12, 9), (7, 5), (1, 300), (6, 1)])
def test_sixels_are_the_pictures_pixels(height, width):
    few = np.random.default_rng(1).integers(0, 2, (height, width, 3), dtype=np.uint8) * 255
    (found,) = terminal.sixels(sixel.encoded(Image.fromarray(few)))
    assert np.array_equal(found, few)


def test_sixels_of_many_colours_are_those_that_are_left():
    ramp = np.linspace(0, 255, 200, dtype=np.uint8)
    smooth = np.stack(np.broadcast_arrays(ramp[:100, None], ramp[None, ::2], 255 - ramp[None, ::2]), axis=-1)
    image = Image.fromarray(smooth)
    fewer = image.quantize(sixel._COLOURS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).convert("RGB")
    (found,) = terminal.sixels(sixel.encoded(image))
    assert len(np.unique(np.asarray(fewer).reshape(-1, 3), axis=0)) > 60
    assert np.abs(found - np.asarray(fewer).astype(int)).max() <= 2, "colours are given in percent"


def test_sixels_shorten_runs():
    (plain,) = terminal.sixels(flat := sixel.encoded(Image.new("RGB", (500, 6), "red")))
    assert (plain == (255, 0, 0)).all() and "!500~" in flat and len(flat) < 60


def test_sixel_gets_as_many_pixels_as_there_are_in_its_cells():
    (found,) = terminal.sixels(shown(Graphics.sixel, picture(), 20, 5, (8, 16), 77))
    assert found.shape == (5 * 16, 20 * 8, 3)
