"""A new cache is begun as a whole: where that fails, such as on a full disk, none of its files stays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from pipeline.storage import Storage


@contextmanager
def whole_or_nothing(storage: Storage, names: Iterable[str]) -> Iterator[None]:
    """Remove those of these files that were not there before, in this order, when what is done here fails."""
    new = [name for name in names if not storage.exists(name)]
    try:
        yield
    except Exception:
        for name in new:
            storage.remove(name)
        raise
