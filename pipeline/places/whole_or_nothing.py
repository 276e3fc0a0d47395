"""Full disks: a clear error, and a new cache is begun as a whole or not at all."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from teachercache.pipeline.errors import DiskSpaceError, place_error
from teachercache.pipeline.places.storage import Storage


@contextmanager
def room_at(url: str) -> Iterator[None]:
    """Raises `DiskSpaceError` when no more files can be written there."""
    try:
        yield
    except OSError as error:
        if (details := place_error(error, url)) is None:
            raise
        raise DiskSpaceError("No more files can be written here; complete ones stay.", **details) from error


@contextmanager
def whole_or_nothing(storage: Storage, names: Iterable[str]) -> Iterator[None]:
    """When the body fails, remove those of these files that did not exist before, in this order."""
    new = [name for name in names if not storage.exists(name)]
    try:
        yield
    except Exception:
        for name in new:
            storage.remove(name)
        raise
