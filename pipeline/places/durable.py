"""File names that survive a crash of the machine: a new one is on disk once its folder is synced."""

import os
from pathlib import Path


def fsync(path: Path) -> None:
    """Sync the bytes of a file, or the names in a folder."""
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
    if os.access(folder.parent, os.R_OK):  # without read permission it cannot be opened to sync it
        fsync(folder.parent)


def link(existing: Path, new: Path) -> None:
    """Give a file a second name, in a folder that is made if missing. Raises `OSError`."""
    make_folder(new.parent)
    new.hardlink_to(existing)
    fsync(new.parent)


def rename(existing: Path, new: Path) -> None:
    """Replaces a file that has the new name. Renames folders too, if nothing has the new name."""
    existing.replace(new)
    fsync(new.parent)
