"""Pictures in a terminal: which way it has of showing them, and what is written to it for one.

Terminals could be asked what they can do, but their answer comes where people type: it would have to be waited for, and
what somebody types meanwhile would be lost. So the environment's variables alone decide.

No library fits: textual-image asks the terminal when it is imported and knows no iTerm2, term-image wants an older
Pillow than ours, and chafa is a compiled library for what is a few lines of each protocol.
"""

from __future__ import annotations

import base64
import enum
from collections.abc import Mapping
from io import BytesIO

from PIL import Image

from . import sixel


class Graphics(enum.StrEnum):
    """A protocol by which terminals show pictures."""

    kitty = "kitty"  # https://sw.kovidgoyal.net/kitty/graphics-protocol
    iterm2 = "iterm2"  # https://iterm2.com/documentation-images.html
    sixel = "sixel"  # https://vt100.net/docs/vt3xx-gp/chapter14.html


# Set by what stands between us and the terminal, and would not hand pictures on; or by machines that nobody looks at.
_BETWEEN = ("TMUX", "STY", "ZELLIJ", "NVIM", "VIM_TERMINAL", "INSIDE_EMACS", "CI")
# By the beginning of TERM, which each terminal sets itself and ssh hands on; what all call themselves is not here.
_BY_TERM = {
    "xterm-kitty": Graphics.kitty,
    "xterm-ghostty": Graphics.kitty,
    "foot": Graphics.sixel,
    "mlterm": Graphics.sixel,
    "contour": Graphics.sixel,
}
_BY_PROGRAM = {
    "kitty": Graphics.kitty,
    "ghostty": Graphics.kitty,
    "iTerm.app": Graphics.iterm2,
    "WezTerm": Graphics.iterm2,
    "mintty": Graphics.iterm2,
}
_KONSOLE = 220400  # the first version that shows pictures: 22.04

_CHUNK = 4096  # bytes of a piece, the most that Kitty's protocol allows


def detect(environment: Mapping[str, str]) -> Graphics | None:
    """What the terminal of an environment is known to show pictures by; None: it is not known to show any."""
    term = environment.get("TERM", "")
    if term.startswith(("tmux", "screen", "dumb")) or any(environment.get(name) for name in _BETWEEN):
        return None
    for beginning, graphics in _BY_TERM.items():
        if term.startswith(beginning):
            return graphics
    # Before the variables that a terminal leaves to all that is started from it, other terminals too.
    program = environment.get("TERM_PROGRAM")
    if program:
        return _BY_PROGRAM.get(program)
    if environment.get("LC_TERMINAL") == "iTerm2":  # handed on by ssh
        return Graphics.iterm2
    if environment.get("KITTY_WINDOW_ID"):
        return Graphics.kitty
    version = environment.get("KONSOLE_VERSION", "")
    if version.isdecimal() and int(version) >= _KONSOLE:
        return Graphics.sixel
    return None


def shown(graphics: Graphics, picture: Image.Image, columns: int, rows: int, cell: tuple[int, int], number: int) -> str:
    """What is written to show a picture with its upper left corner at the cursor.

    Args:
        picture: RGB.
        columns, rows: cells that it fills.
        cell: width and height of one in pixels; only Sixel, which does not scale, depends on it.
        number: of Kitty's: a picture of the same number is replaced.
    """
    if graphics is Graphics.sixel:
        return sixel.encoded(picture.resize((columns * cell[0], rows * cell[1]), Image.Resampling.BICUBIC))
    file = BytesIO()
    picture.save(file, format="PNG")
    data = base64.b64encode(file.getvalue()).decode()
    if graphics is Graphics.iterm2:
        size = f"width={columns};height={rows};preserveAspectRatio=0;size={len(file.getvalue())}"
        return f"\x1b]1337;File=inline=1;{size}:{data}\a"
    # q=2: no answer, which would come where people type; C=1: the cursor stays.
    keys = f"a=T,f=100,i={number},c={columns},r={rows},C=1,q=2,"
    parts = [data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK)]
    last = len(parts) - 1
    return "".join(
        f"\x1b_G{keys if index == 0 else ''}m={int(index < last)};{part}\x1b\\" for index, part in enumerate(parts)
    )


def removed(graphics: Graphics, number: int) -> str:
    """What is written so that a picture does not stay where its cells are erased; the other protocols' go with them."""
    return f"\x1b_Ga=d,d=I,i={number},q=2\x1b\\" if graphics is Graphics.kitty else ""
