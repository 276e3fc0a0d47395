"""Numbers for people."""

import re
from decimal import Decimal

from teachercache.pipeline.errors import RecipeError

_BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}


def human_number(value: float, digits: int = 3) -> str:
    """12345.6 → "12,300", 4.2e-5 → "0.000042": significant digits, and never an exponent."""
    return f"{Decimal(f'{value:.{digits}g}'):,f}"


def human_bytes(count: float, unit: str = "B") -> str:
    """1234567 → "1.23 MB" (decimal units, three significant digits)."""
    value, prefixes = float(count), ["", "k", "M", "G", "T", "P"]
    while value >= 999.5 and len(prefixes) > 1:
        value, prefixes = value / 1000, prefixes[1:]
    return f"{human_number(value)} {prefixes[0]}{unit}"


def human_hours(hours: float, digits: int = 3) -> tuple[str, str]:
    """4.15 → ("4.15", "hours"), 0.00007 → ("0.252", "seconds"): the number, and the unit it reads well in."""
    for unit, size in (("hours", 1), ("minutes", 60)):
        if hours * size >= 1 or not hours:
            return human_number(hours * size, digits), unit
    return human_number(3600 * hours, digits), "seconds"


def human_seconds(seconds: float) -> str:
    """5400 → "1.5 h" (two or three significant digits)."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{human_number(seconds / size)} {unit}"
    return f"{human_number(seconds)} s"


def parse_bytes(text: str) -> int:
    """ "6TB", "500 GB", "4.5e12" → bytes (decimal units). Raises `RecipeError`."""
    match = re.fullmatch(r"\s*([0-9.]+(?:E\+?[0-9]+)?)\s*([KMGTP]?)B?\s*", text.upper())
    try:
        return int(float(match[1]) * _BYTES[match[2]]) if match else int(text)
    except (ValueError, OverflowError):
        raise RecipeError("This is not a number of bytes.", got=repr(text), expected="such as 6TB") from None
