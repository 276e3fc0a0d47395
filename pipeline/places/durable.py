"""Names that survive a crash of the machine: a new one is on the disk once the folder it is in was synced."""

from __future__ import annotations

import os
from pathlib import Path


def fsync(path: Path) -> None:
    """Of a file its bytes, of a folder the names in it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """`mkdir -p`, with the name of every new folder synced in the one above."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    if os.access(folder.parent, os.R_OK):  # else it may be written to, and cannot be opened to be synced
        fsync(folder.parent)


def link(existing: Path, new: Path) -> None:
    """A second name for a file, in a folder that is made where it is not there. Raises `OSError`."""
    make_folder(new.parent)
    new.hardlink_to(existing)
    fsync(new.parent)


def rename(existing: Path, new: Path) -> None:
    """The new name replaces what has it; folders too (then nothing may have it)."""
    existing.replace(new)
    fsync(new.parent)
