"""How often the host waits for a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def count_waits() -> Iterator[list[int]]:
    """Synchronisations that torch warns of: [their number], known at the end."""
    waits = [0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits[0] = sum("synchroniz" in str(warning.message) for warning in caught)
