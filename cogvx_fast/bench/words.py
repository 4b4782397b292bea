"""Times and sizes as text."""

from __future__ import annotations

import math


def seconds(value: float | None) -> str:
    """A time with three significant digits and its unit; "" for None."""
    if value is None:
        return ""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 1 or unit == "µs":
            return f"{_significant(value * factor)} {unit}"
    raise AssertionError


def _significant(value: float, digits: int = 3) -> str:
    decimals = max(0, digits - 1 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{decimals}f}"


def size(value: int | None) -> str:
    """Bytes in MB or GB of a million and a billion; "" for None."""
    if value is None:
        return ""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"
