"""Numbers for people."""

from __future__ import annotations

import re

from teachercache.pipeline.errors import RecipeError

_BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}


def human_bytes(count: float) -> str:
    """1234567 → "1.23 MB" (decimal units, three significant digits)."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def human_seconds(seconds: float) -> str:
    """5400 → "1.5 h" (two or three significant digits)."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def parse_bytes(text: str) -> int:
    """ "6TB", "500 GB", "4.5e12" → bytes (decimal units). Raises `RecipeError`."""
    match = re.fullmatch(r"\s*([0-9.]+(?:E\+?[0-9]+)?)\s*([KMGTP]?)B?\s*", text.upper())
    try:
        return int(float(match[1]) * _BYTES[match[2]]) if match else int(text)
    except (ValueError, OverflowError):
        raise RecipeError("This is not a number of bytes.", got=repr(text), expected="such as 6TB") from None
