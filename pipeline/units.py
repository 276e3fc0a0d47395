"""Numbers for people."""

from __future__ import annotations


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
