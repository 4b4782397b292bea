"""Sixel: a picture as strips of six rows, in which each colour is drawn by itself."""

from __future__ import annotations

import re

import numpy as np
from PIL import Image

_COLOURS = 128  # of up to 256 that terminals have: each costs time and bytes in each strip
_ROWS = 6
_RUN = re.compile(rb"(.)\1{3,}")  # a shorter one is as long written out


def encoded(picture: Image.Image) -> str:
    """An RGB picture; its pixels are shown one by one, the cursor is left somewhere behind."""
    # The octree takes milliseconds, the median cut seconds, of pictures as large as these.
    indexed = picture.quantize(_COLOURS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    indexes, palette = np.asarray(indexed), indexed.getpalette() or []
    height, width = indexes.shape
    found = ["\x1bP0;1;0q", f'"1;1;{width};{height}']
    for colour in np.unique(indexes).tolist():
        red, green, blue = (round(part * 100 / 255) for part in palette[3 * colour : 3 * colour + 3])
        found.append(f"#{colour};2;{red};{green};{blue}")
    for top in range(0, height, _ROWS):
        strip = indexes[top : top + _ROWS]
        weights = (1 << np.arange(len(strip), dtype=np.uint8))[:, None]
        # "$" goes back to the strip's beginning, "-" on to the next one.
        found.append(
            "$".join(f"#{colour}{_row((strip == colour) * weights)}" for colour in np.unique(strip).tolist()) + "-"
        )
    return "".join(found) + "\x1b\\"


def _row(bits: np.ndarray) -> str:
    """Bits `(rows, width)`, each already at its place, as a character for each column, runs shortened."""
    columns = (bits.sum(axis=0, dtype=np.uint8) + 63).tobytes()
    return _RUN.sub(lambda run: b"!%d%s" % (len(run[0]), run[1]), columns).decode()
