"""Files in a folder: they get their names once they are complete, and survive a crash of the machine."""

import errno
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from teachercache.pipeline.errors import CacheError, IrregularFileError
from teachercache.pipeline.places.durable import fsync, link, make_folder, rename
from teachercache.pipeline.places.files import ChecksumWriter
from teachercache.pipeline.places.locks import LOCK_SUFFIX
from teachercache.pipeline.places.processes import TEMPORARY_SUFFIX, is_abandoned, is_stale, temporary_of
from teachercache.pipeline.places.storage import Storage, safe_name

_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}


class LocalStorage(Storage):
    """A folder on a local (or mounted) file system."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).expanduser().absolute()
        self.url = str(self.root)
        self._seen: dict[Path, tuple[tuple[int, int, int], float]] = {}

    def path(self, name: str) -> Path:
        return Path(self._path(name))

    def _path(self, name: str) -> str:
        """`path` without the cost of a `Path`, which matters where thousands of records are read."""
        return f"{self.url}/{safe_name(name)}"

    def _open(self, name: str) -> IO[bytes]:
        return open(self.open_descriptor(name), "rb")  # noqa: PTH123

    def open_descriptor(self, name: str) -> int:
        """A descriptor to read from. Raises `IrregularFileError` for a pipe or a device, which has no end."""
        path = self._path(name)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait for its writer
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise IrregularFileError(
                "This is not a regular file.",
                got=path,
                expected="a file, or a link to one",
                do="remove it; if you did not put it there, do not use this place",
            )
        return descriptor

    def _read(self, name: str) -> bytes:
        with self._open(name) as file:
            return file.read()

    def _read_range(self, name: str, offset: int, nbytes: int) -> bytes:
        with self._open(name) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(min(offset, size))
            return file.read(min(nbytes, max(0, size - offset)))

    @contextmanager
    def open_write(self, name: str) -> Iterator[ChecksumWriter]:
        target = self.path(name)
        make_folder(target.parent)
        temporary = temporary_of(target)
        try:
            with temporary.open("xb") as file:
                yield ChecksumWriter(file)
                file.flush()
                os.fsync(file.fileno())
            rename(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def write_new(self, name: str, data: bytes) -> bool:
        target = self.path(name)
        make_folder(target.parent)
        temporary = temporary_of(target)
        try:
            temporary.write_bytes(data)
            fsync(temporary)
            link(temporary, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            return self._create(name, data)
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _create(self, name: str, data: bytes) -> bool:
        """`write_new` where a file cannot have two names (exFAT, some network mounts).

        The file exists before its bytes do, so others may read a part of them, and a process that dies in
        between leaves a part behind: an unreadable lock counts for a while (`is_stale`).
        """
        target = self.path(name)
        try:
            handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        except OSError as error:
            raise CacheError(
                "No file can be created exclusively here.",
                got=f"{target}: no hard links, and without them: {error.strerror or error}",
                expected="a file system with hard links or exclusive creation (O_EXCL)",
                do="choose another place for the cache (cache=…)",
            ) from error
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        fsync(target.parent)
        return True

    def _break(self, lock: str, holder: bytes) -> None:
        """Only one process can move a lock away; a lock taken over in the meantime is put back."""
        aside = temporary_of(self.path(lock))
        try:
            self.path(lock).rename(aside)
        except FileNotFoundError:
            return
        if (new_holder := aside.read_bytes()) != holder:
            self.write_new(lock, new_holder)
        aside.unlink()

    def _size(self, name: str) -> int | None:
        try:
            status = os.stat(self._path(name))  # noqa: PTH116
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def _names(self, folder: str) -> list[str]:
        try:
            entries = os.scandir(self.path(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []
        with entries:
            return sorted(e.name for e in entries if not e.name.endswith(TEMPORARY_SUFFIX))

    def walk(self, folder: str = "") -> Iterator[tuple[str, int]]:
        pending = [(f"{safe_name(folder)}/" if folder else "", frozenset[tuple[int, int]]())]
        while pending:
            prefix, above = pending.pop()
            identity, files, folders = self._retrying(self._list, prefix)
            if identity not in above:
                yield from files
                pending += [(name, above | {identity}) for name in reversed(folders)]

    def _list(self, prefix: str) -> tuple[tuple[int, int], list[tuple[str, int]], list[str]]:
        """(device and inode, files with their sizes, subfolders) of one folder, sorted."""
        status = (self.root / prefix).stat()
        with os.scandir(self.root / prefix) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        files = [
            (prefix + entry.name, entry.stat(follow_symlinks=entry.is_file()).st_size)
            for entry in listed
            if entry.is_file() or (entry.is_symlink() and not entry.is_dir())
        ]
        return (status.st_dev, status.st_ino), files, [f"{prefix}{e.name}/" for e in listed if e.is_dir()]

    def remove(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        existing = self.root
        while not existing.exists():
            existing = existing.parent
        return shutil.disk_usage(existing).free

    def sweep(self) -> list[str]:
        """Files of processes on other machines go once they have not changed for long (`_unchanged_s`)."""
        gone = []
        for path in self.root.rglob(f"*{TEMPORARY_SUFFIX}"):
            if is_abandoned(path, self._unchanged_s(path)):
                path.unlink(missing_ok=True)
                gone.append(path)
        for path in self.root.rglob(f"*{LOCK_SUFFIX}"):
            name = str(path.relative_to(self.root))
            holder = self._read_if_there(name)
            is_left = holder is not None and is_stale(holder, self._unchanged_s(path))
            if is_left and self._read_if_there(name) == holder:  # nobody has taken it over
                path.unlink(missing_ok=True)
                gone.append(path)
        return sorted(str(path.relative_to(self.root)) for path in gone)

    def _unchanged_s(self, path: Path) -> float:
        """For how long this object has seen the file unchanged, by the clock of this machine: the clocks of
        file systems and other machines may be off by any amount."""
        try:
            status = path.stat()
        except FileNotFoundError:
            return 0.0
        state, now = (status.st_ino, status.st_size, status.st_mtime_ns), time.monotonic()
        if path not in self._seen or self._seen[path][0] != state:
            self._seen[path] = state, now
        return now - self._seen[path][1]
