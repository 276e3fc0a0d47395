"""Write files of a run whole or not at all, even after a power cut, or raise a clear error."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from teachercache.pipeline.errors import CheckpointError, DiskSpaceError, TeacherCacheError
from teachercache.pipeline.places.durable import fsync, rename
from teachercache.pipeline.places.processes import temporary_of

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A name to write a file to; it becomes `target` when the block ends, and is removed if it fails."""
    temporary = temporary_of(target)
    try:
        yield temporary
        fsync(temporary)
        rename(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


_GOES_ON = "it continues from the newest checkpoint, and earlier ones are complete"


@contextmanager
def saving(what: str, place: Path, then: str = _GOES_ON) -> Iterator[None]:
    """Raises `DiskSpaceError` if a disk or a quota is full, `CheckpointError` if it fails otherwise."""
    try:
        yield
    except TeacherCacheError:
        raise
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _number_in(error)
        if number is None and isinstance(error, SafetensorError):
            raise
        kind = DiskSpaceError if number in _FULL else CheckpointError
        raise kind(
            f"{what} cannot be written.",
            got=f"{place}: {os.strerror(number) if number else error}",
            expected="room for it, in a folder that this user can write to",
            do=f"make room or choose another place, and run the same command again: {then}",
        ) from error


def _number_in(error: SafetensorError) -> int | None:
    """The errno of a failed write, which safetensors states only in its message."""
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None
