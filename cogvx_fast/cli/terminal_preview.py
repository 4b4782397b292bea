"""`--terminal-preview`: pictures of the video that is being made, above the progress bar and gone with it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.control import Control
from rich.live_render import LiveRender
from rich.segment import ControlType, Segment

from .console import UsageError, messages
from .graphics import Graphics, detect, removed, shown
from .interruption import held_back

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from rich.progress import Progress

PERIOD = 1.0  # seconds between two pictures, at least
_SHARE = 0.05  # of the time, at most, that drawing may take: Sixels cost more than they seem
_FRAMES = 3  # of the video side by side: its beginning, middle and end show how it moves
_MOST_ROWS, _FEWEST_ROWS = 12, 3
_SPARE = 2  # rows of the terminal that are left free beside picture and bars
_GAP = 2  # pixels between two of them
_SMALL = 64  # pixels: smaller frames are enlarged before, or the terminal would blur the gaps with them
_CELL = (8, 16)  # pixels of a terminal's cell that does not say so: rather small, as Sixel must not reach the bar
_SAVE, _RESTORE, _ERASE_BELOW = "\x1b7", "\x1b8", "\x1b[J"


def choose(option: str) -> Graphics | None:
    """By what pictures are shown; None: they are not.

    Args:
        option: "auto", "off", or the name of a protocol.

    Raises:
        UsageError: for a protocol where there is no terminal to show pictures in.
    """
    if option == "off":
        return None
    # Not rich's `is_terminal`, which FORCE_COLOR makes true for files, too.
    is_seen = sys.stderr.isatty() and messages.is_interactive and not messages.is_dumb_terminal
    if option == "auto":
        return detect(os.environ) if is_seen else None
    if not is_seen:
        words = "needs a terminal, which standard error is not here; leave it out or use --preview FILE"
        raise UsageError("--terminal-preview", repr(option), words)
    return Graphics(option)


class _Raw:
    """What goes to the terminal as it is, in one piece with the progress bar that is drawn again behind it."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        # As a control code of any kind, so that nobody counts its width.
        yield Segment(self._text, None, [(ControlType.CURSOR_FORWARD, 0)])


class TerminalPreview(RenderHook):
    """Pictures in a place of their own right above a progress display, each drawn over the one before.

    Rich draws the bar again and again from its first row on, which is where the cursor is when something is printed
    meanwhile: the picture's place is as many rows further up, whatever the number of bars. What others print moves the
    bar down; then the next picture gets a new place above it.
    """

    def __init__(self, graphics: Graphics, progress: Progress, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            progress: a display that runs, on the terminal.
        """
        self._graphics, self._progress, self._clock = graphics, progress, clock
        self._console = progress.console
        self._number = os.getpid() % 0xFFFFFF + 1  # of Kitty's pictures, which other programs may have, too
        self._due = clock()
        self._place: tuple[int, int] | None = None  # columns and rows that are taken above the bar
        self._console_size = self._console.size

    @contextlib.contextmanager
    def there(self) -> Iterator[None]:
        """Within the block there may be a picture; afterwards its rows are free again, also after Ctrl-C."""
        self._console.push_render_hook(self)
        try:
            yield
        finally:
            self._console.pop_render_hook()
            self._remove()

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Called by rich for all that is printed: sees what moves the bar away from the picture."""
        if not all(isinstance(found, _Raw | Control | LiveRender) for found in renderables):
            self._forget()
        return renderables

    def show(self, pictures: torch.Tensor) -> None:
        """Draw some of `pictures`, uint8 `(batch, frames, height, width, 3)`, unless the last are too recent."""
        start = self._clock()
        if start < self._due:
            return
        strip = side_by_side(pictures)
        if self._console.size != self._console_size:  # all lines have moved, as the terminal saw fit
            self._forget()
            self._console_size = self._console.size
        cell = cell_size()
        free = self._console.height - len(self._progress.tasks) - _SPARE
        place = cells(strip, cell, self._console.width - 1, min(_MOST_ROWS, free))
        if place is None:
            self._remove()
        else:
            columns, rows = place
            drawn = shown(self._graphics, strip, columns, rows, cell, self._number)
            if self._place != place:
                self._remove()
            with held_back():  # so that it is known what has to be removed
                begin = "" if self._place == place else "\n" * rows
                self._write(f"{begin}{_SAVE}\x1b[{rows}A\r{drawn}{_RESTORE}")
                self._place = place
        end = self._clock()
        self._due = end + max(PERIOD, (end - start) / _SHARE)

    def _remove(self) -> None:
        if self._place is not None:
            with held_back():
                rows, self._place = self._place[1], None
                self._write(f"{removed(self._graphics, self._number)}\x1b[{rows}A\r{_ERASE_BELOW}")

    def _forget(self) -> None:
        """The next picture is drawn elsewhere; this one stays where it is, as what was printed does."""
        self._place = None

    def _write(self, text: str) -> None:
        self._console.print(_Raw(text), crop=False)


def side_by_side(pictures: torch.Tensor) -> Image.Image:
    """The first, middle and last frame of the first clip of `(batch, frames, height, width, 3)`, on black."""
    from PIL import Image

    last = pictures.shape[1] - 1
    chosen = sorted({last * index // (_FRAMES - 1) for index in range(_FRAMES)})
    frames = [Image.fromarray(frame) for frame in pictures[0, chosen].cpu().numpy()]
    times = max(1, _SMALL // min(frames[0].size))
    width, height = frames[0].width * times, frames[0].height * times
    frames = [frame.resize((width, height), Image.Resampling.BICUBIC) for frame in frames]
    strip = Image.new("RGB", ((width + _GAP) * len(frames) - _GAP, height))
    for index, frame in enumerate(frames):
        strip.paste(frame, (index * (width + _GAP), 0))
    return strip


def cells(picture: Image.Image, cell: tuple[int, int], columns: int, rows: int) -> tuple[int, int] | None:
    """Columns and rows of a picture as large as fits into so many; None: there is too little room.

    Args:
        cell: width and height of one in pixels.
    """
    if rows < _FEWEST_ROWS or columns < 1:
        return None
    shape = picture.width / picture.height * cell[1] / cell[0]  # columns a row
    rows = min(rows, int(columns / shape))
    return (max(1, min(columns, round(rows * shape))), rows) if rows >= 1 else None


def cell_size() -> tuple[int, int]:
    """Width and height in pixels of a cell of the terminal of standard error.

    The kernel is asked, which knows it from the terminal, not the terminal itself: that would answer by typing.
    """
    try:
        answer = fcntl.ioctl(sys.__stderr__, termios.TIOCGWINSZ, bytes(8))  # type: ignore[arg-type]
        rows, columns, width, height = struct.unpack("HHHH", answer)
    except (OSError, ValueError, TypeError):
        return _CELL
    if not (rows and columns and width >= columns and height >= rows):
        return _CELL
    return width // columns, height // rows
