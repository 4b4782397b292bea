"""What a program writes to a terminal, read as terminals read it: pictures out of it, and where the cursor is."""

import base64
import re
from io import BytesIO

import numpy as np
from PIL import Image

_KITTY = re.compile("\x1b_G([^;\x1b]*)(?:;([^\x1b]*))?\x1b\\\\")
_ITERM2 = re.compile("\x1b]1337;File=([^:]*):([^\a]*)\a")
_SIXEL = re.compile("\x1bP([0-9;]*)q([^\x1b]*)\x1b\\\\")


def keys_of(text, separator=","):
    return dict(part.split("=") for part in text.split(separator) if part)


def kitty(text):
    """Kitty's commands in turn: the keys of each, and the picture of those that bring one."""
    found, data = [], None
    for keys, payload in _KITTY.findall(text):
        keys = keys_of(keys)
        if data is None:
            found.append((keys, None))
            data = "" if "m" in keys else None
        if data is not None:
            assert len(payload) <= 4096 and (found[-1][0] is keys or set(keys) == {"m"})
            data += payload
            if keys["m"] == "0":
                found[-1] = found[-1][0], _png(data)
                data = None
            else:
                assert len(payload) % 4 == 0, "each piece but the last can be decoded alone"
    assert data is None, "the last picture is whole"
    return found


def iterm2(text):
    """The arguments and the picture of each of iTerm2's sequences."""
    found = []
    for keys, data in _ITERM2.findall(text):
        keys = keys_of(keys, ";")
        assert int(keys["size"]) == len(base64.b64decode(data, validate=True))
        found.append((keys, _png(data)))
    return found


def _png(data):
    image = Image.open(BytesIO(base64.b64decode(data, validate=True)))
    assert image.format == "PNG"
    image.load()
    return image


def sixels(text):
    """The pictures as pixels `(height, width, 3)`, by the manual of the VT340: -1 where none was drawn."""
    return [_sixel(data) for _, data in _SIXEL.findall(text)]


def _sixel(data):
    token = re.compile(r'"(\d+);(\d+);(\d+);(\d+)|#(\d+)(?:;2;(\d+);(\d+);(\d+))?|!(\d+)([?-~])|([?-~])|([$-])')
    position, palette, colour, left, top, pixels = 0, {}, None, 0, 0, None
    while position < len(data):
        found = token.match(data, position)
        assert found, data[position : position + 20]
        position = found.end()
        if found[1]:
            assert (found[1], found[2]) == ("1", "1"), "square pixels"
            pixels = np.full((int(found[4]), int(found[3]), 3), -1)
        elif found[5]:
            colour = int(found[5])
            if found[6]:
                palette[colour] = [round(int(found[index]) * 255 / 100) for index in (6, 7, 8)]
        elif found[12]:
            left, top = 0, top + 6 * (found[12] == "-")
        else:
            times, bits = int(found[9] or 1), ord(found[10] or found[11]) - 63
            for row in range(6):
                if bits >> row & 1:
                    assert top + row < pixels.shape[0] and left + times <= pixels.shape[1], "nothing is drawn outside"
                    pixels[top + row, left : left + times] = palette[colour]
            left += times
    return pixels


class Screen:
    """A terminal's rows of text, scrolled ones too, and at which row each picture was drawn.

    It knows what rich and the previews write, and refuses the rest.
    """

    _TOKEN = re.compile(
        "\x1b\\[([?0-9;]*)([A-Za-z])|\x1b([78])|\x1b_G[^\x1b]*\x1b\\\\|\x1bP[^\x1b]*\x1b\\\\|\x1b]1337[^\a]*\a"
    )

    def __init__(self, height):
        self.height, self.lines, self.row, self.column = height, [""], 0, 0
        self.pictures, self.saved = [], None

    def read(self, text):
        position = 0
        while position < len(text):
            letter = text[position]
            if letter == "\x1b":
                found = self._TOKEN.match(text, position)
                assert found, repr(text[position : position + 30])
                position = found.end()
                self._control(found)
                continue
            position += 1
            if letter == "\n":
                self.row += 1  # and to the first column: the kernel adds a carriage return
                self.column = 0
                while len(self.lines) <= self.row:
                    self.lines.append("")
            elif letter == "\r":
                self.column = 0
            else:
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + letter + line[self.column + 1 :]
                self.column += 1
        return self

    @property
    def top(self):
        return max(0, len(self.lines) - self.height)

    def _control(self, found):
        if found[3]:
            if found[3] == "7":
                self.saved = self.row, self.column
            else:
                self.row, self.column = self.saved
        elif found[2] is None:
            if not found[0].startswith("\x1b_Gm=") and ",d=" not in found[0]:
                self.pictures.append((self.row, self.column))
        elif found[2] == "A":
            self.row = max(self.top, self.row - int(found[1]))
        elif found[2] == "K":
            assert found[1] == "2"
            self.lines[self.row] = ""
        elif found[2] == "J":
            assert found[1] == ""
            self.lines[self.row] = self.lines[self.row][: self.column]
            del self.lines[self.row + 1 :]
        else:
            assert found[2] in "mhl", found[0]
