"""Full disks: said in words, and a new cache is begun as a whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from teachercache.pipeline.errors import DiskSpaceError, place_error
from teachercache.pipeline.places.storage import Storage


@contextmanager
def room_at(url: str) -> Iterator[None]:
    """Raises `DiskSpaceError` when the place takes no more files."""
    try:
        yield
    except OSError as error:
        if (words := place_error(error, url)) is None:
            raise
        raise DiskSpaceError("This place takes no more files; what is whole there stays.", **words) from error


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
