"""Where bytes live: a local folder, or any `fsspec` URL (`s3://bucket/prefix`, `memory://…`).

Everything a cache writes goes through `Storage`, because the commit protocol rests on its promise:
a name either does not exist or holds all of its bytes. Locally that is temporary name → fsync →
rename → fsync of the folder; on an object store it is a single PUT (or a completed multipart upload).
"""

from __future__ import annotations

import errno
import io
import logging
import os
import posixpath
import random
import shutil
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

import fsspec
import xxhash
from fsspec.spec import AbstractBufferedFile
from typing_extensions import Buffer

from teachercache.pipeline.errors import CacheError, IrregularFileError, StorageError
from teachercache.pipeline.places.durable import fsync, link, make_folder, rename
from teachercache.pipeline.places.processes import (
    TEMPORARY_SUFFIX,
    Process,
    describe_holder,
    is_abandoned,
    is_stale,
    temporary_of,
)
from teachercache.pipeline.places.retries import is_passing, retrying

LOCK_SUFFIX = ".lock"
_READ_BLOCK = 1 << 22
_HTTP_S = 15.0
_HEAD_NBYTES, _TAIL_NBYTES = 1 << 12, 1 << 16  # the tail holds the index of up to 4,000 rows
_LOCK_POLL_S = 0.05
_BREAK_WITHIN_S = 2.0
_SAY_SO_AFTER_S = 5.0
_REMOTE_THREADS = 16
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


class ChecksumWriter:
    """A write-only file that hashes what passes through: one pass over the bytes, none to verify."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = xxhash.xxh3_128()
        self._head, self._tail = b"", bytearray()
        self.nbytes = 0

    def write(self, data: Buffer) -> None:
        self._file.write(data)
        self._hash.update(data)
        view = memoryview(data).cast("B")
        self._head += view[: _HEAD_NBYTES - len(self._head)]
        self._tail += view[-_TAIL_NBYTES:]
        if len(self._tail) > 8 * _TAIL_NBYTES:
            del self._tail[:-_TAIL_NBYTES]
        self.nbytes += len(view)

    @property
    def checksum(self) -> str:
        return self._hash.hexdigest()

    @property
    def ends(self) -> str:
        """As `Storage.ends`."""
        return _ends_hash(self._head, bytes(self._tail[-_TAIL_NBYTES:]))


def _ends_hash(head: bytes, tail: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(head + tail)


class Storage(ABC):
    """A folder of whole files. Names are relative POSIX paths and cannot leave the folder.

    Whatever is read is read again where it fails for the moment (`retrying`), and raises `StorageError`, with
    the file's name, where it fails for longer.
    """

    url: str

    @staticmethod
    def at(url: str | os.PathLike[str]) -> Storage:
        """The storage at a local path or an fsspec URL."""
        text = os.fspath(url)
        if "://" in text and not text.startswith("file://"):
            return RemoteStorage(text)
        return LocalStorage(text.removeprefix("file://"))

    def open_read(self, name: str) -> IO[bytes]:
        return io.BufferedReader(_RereadFile(lambda: self._open(name), f"{self.url}/{name}"))

    @abstractmethod
    def _open(self, name: str) -> IO[bytes]:
        """A file whose reads are not repeated."""

    @abstractmethod
    def open_write(self, name: str) -> Any:
        """Context manager yielding a `ChecksumWriter`; the name appears, whole, when it exits cleanly."""

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None when it does not exist."""
        return self._retrying(self._size, name)

    @abstractmethod
    def _size(self, name: str) -> int | None: ...

    def names(self, folder: str) -> list[str]:
        """Sorted base names of the finished files directly in `folder` (empty when it is missing)."""
        return self._retrying(self._names, folder)

    @abstractmethod
    def _names(self, folder: str) -> list[str]: ...

    @abstractmethod
    def walk(self, folder: str = "") -> Iterator[tuple[str, int]]:
        """(name, bytes) of every file below `folder`, lazily, in one order everywhere.

        The files of a folder come before its subfolders, each sorted by name. Symbolic links are
        followed; a dangling one is listed as the file it claims to be, a link to a folder above is not
        entered. Raises `FileNotFoundError` for a missing folder.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete a file; a missing one is not an error."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Bytes that can still be written, or None where that has no meaning (object stores)."""

    @abstractmethod
    def sweep(self) -> list[str]:
        """Delete the temporary files and the locks that dead processes left behind; returns their names."""

    def read(self, name: str) -> bytes:
        return self._retrying(self._read, name)

    def _retrying(self, read: Callable[..., Result], name: str, *rest: int) -> Result:
        return retrying(lambda: read(name, *rest), f"{self.url}/{name}")

    @abstractmethod
    def _read(self, name: str) -> bytes: ...

    def read_range(self, name: str, offset: int, nbytes: int) -> bytes:
        """`nbytes` bytes from `offset`: fewer where the file ends, and no memory taken for the rest."""
        if offset < 0 or nbytes < 0:  # offsets, too, come from files we read
            raise CacheError(f"{nbytes} bytes from {offset} are no bytes of {name}.")
        return self._retrying(self._read_range, name, offset, nbytes)

    @abstractmethod
    def _read_range(self, name: str, offset: int, nbytes: int) -> bytes: ...

    def read_ranges(self, names: Sequence[str], offsets: Sequence[int], nbytes: Sequence[int]) -> list[bytes]:
        """`read_range` of several files, at once where that is faster."""
        return [self.read_range(*one) for one in zip(names, offsets, nbytes, strict=True)]

    def ends(self, names: Sequence[str], sizes: Sequence[int]) -> list[str]:
        """xxh3-64, in hex, of the first 4 and the last 64 KiB of files that should have these sizes.

        Tells files apart at the cost of two small reads each. Raises `FileNotFoundError`.
        """
        starts = [*(0 for _ in sizes), *(max(0, size - _TAIL_NBYTES) for size in sizes)]
        lengths = [min(size, most) for most in (_HEAD_NBYTES, _TAIL_NBYTES) for size in sizes]
        found = self.read_ranges([*names, *names], starts, lengths)
        return [_ends_hash(*pair) for pair in zip(found[: len(names)], found[len(names) :], strict=True)]

    def each(self, read: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """What `read` gives for each item, side by side where every read waits for an answer."""
        return [read(item) for item in items]

    def write(self, name: str, data: Buffer) -> None:
        with self.open_write(name) as file:
            file.write(data)

    @abstractmethod
    def write_new(self, name: str, data: bytes) -> bool:
        """Write a file that is not there yet, and say whether it was this call that did."""

    @contextmanager
    def exclusive(self, name: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """One holder of this name at a time, over all processes and machines; the others wait.

        The holder's process is noted in `<name>.lock`. Of one that died here the lock is taken over at once,
        of one on another machine once it has been seen unchanged for ten minutes, by the clock of who waits;
        so what is held for has to be shorter. `waiting` is called again and again by those who wait, and ends
        it by raising. The time in the lock is for people: no clock but one's own tells how old it is.
        """
        lock, own = f"{name}{LOCK_SUFFIX}", f"{Process.this().tag()}~{time.time():.0f}".encode()
        try:
            self._acquire(lock, own, waiting)
            yield
        finally:
            if self._read_if_there(lock) == own:
                self.remove(lock)

    def _acquire(self, lock: str, own: bytes, waiting: Callable[[], None]) -> None:
        """Who wrote the lock is read, not taken from the answer to the write, which can be lost on its way.

        Somebody who took a new lock for the stale one before it may also have removed it.
        """
        began, told = time.monotonic(), False
        seen, since = None, began
        while True:
            holder = self._read_if_there(lock)
            if holder is None:
                self.write_new(lock, own)
                holder = self._read_if_there(lock)
            if holder == own:
                return
            now = time.monotonic()
            if holder != seen:
                seen, since = holder, now
            if holder is not None and is_stale(holder, now - since):
                self._break(lock, holder)
                continue
            if not told and now - began > _SAY_SO_AFTER_S:
                log.warning("waiting for %s/%s, held by %s", self.url, lock, describe_holder(holder))
                told = True
            waiting()
            time.sleep(random.uniform(0.5, 1.5) * _LOCK_POLL_S)

    def _break(self, lock: str, holder: bytes) -> None:
        """Remove a stale lock, unless somebody has taken it over: two who look at once would both hold it.

        Here they look at different times; a lock of the dead and both within a request is what remains.
        """
        time.sleep(random.uniform(0, _BREAK_WITHIN_S))
        if self._read_if_there(lock) == holder:
            self.remove(lock)

    def _read_if_there(self, name: str) -> bytes | None:
        try:
            return self.read(name)
        except FileNotFoundError:
            return None

    def exists(self, name: str) -> bool:
        return self.size(name) is not None

    def checksum(self, name: str) -> str:
        """xxh3-128 of a file's bytes, in hex."""
        digest = xxhash.xxh3_128()
        with self.open_read(name) as file:
            while block := file.read(_READ_BLOCK):
                digest.update(block)
        return digest.hexdigest()


class _RereadFile(io.RawIOBase):
    """A file to read that is opened anew, at the same place, where a read of it fails for the moment."""

    def __init__(self, open_file: Callable[[], IO[bytes]], what: str) -> None:
        self._open_file, self._what = open_file, what
        self._place = 0
        self._file: IO[bytes] | None = None
        retrying(self._opened, what)

    def _opened(self) -> IO[bytes]:
        if self._file is None:
            self._file = self._open_file()
        return self._file

    def _forget(self) -> None:
        with suppress(OSError):  # it is given up because it fails
            self._opened().close()
        self._file = None

    def _read_at_place(self, buffer: Any) -> int:
        file: Any = self._opened()
        file.seek(self._place)
        return file.readinto(buffer) or 0

    def readinto(self, buffer: Any) -> int:
        nbytes = retrying(lambda: self._read_at_place(buffer), self._what, again=self._forget)
        self._place += nbytes
        return nbytes

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            offset += retrying(lambda: self._opened().seek(0, os.SEEK_END), self._what, again=self._forget)
        self._place = offset + self._place if whence == os.SEEK_CUR else offset
        return self._place

    def tell(self) -> int:
        return self._place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        super().close()


def safe_name(name: str) -> str:
    """`name`, if it is a relative path that stays inside its folder; names come from files we read."""
    if not name or name.startswith("/") or ".." in name.split("/") or "\\" in name or "\0" in name:
        raise CacheError(
            "A file name in this cache would leave its folder.",
            got=repr(name),
            expected="a relative path without '..'",
            do="do not use this cache: it was damaged or made to do harm",
        )
    return posixpath.normpath(name)


class LocalStorage(Storage):
    """A folder on a local (or mounted) file system."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).expanduser().absolute()
        self.url = str(self.root)
        self._seen: dict[Path, tuple[tuple[int, int, int], float]] = {}

    def path(self, name: str) -> Path:
        return Path(self._path(name))

    def _path(self, name: str) -> str:
        """`path` without the cost of one, which counts where thousands of records are read."""
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
                "This is no regular file.",
                got=path,
                expected="a file, or a link to one",
                do="remove what is there; do not use this place if you did not put it there",
            )
        return descriptor

    def _read(self, name: str) -> bytes:
        with self._open(name) as file:
            return file.read()

    def _read_range(self, name: str, offset: int, nbytes: int) -> bytes:
        with self._open(name) as file:
            rest = os.fstat(file.fileno()).st_size - offset
            if rest <= 0:
                return b""
            if offset:
                file.seek(offset)
            return file.read(min(nbytes, rest))

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

        It is there before its bytes are, so others may read a part of them, and who dies in between leaves
        a part behind: an unreadable lock counts for a while (`_is_stale`).
        """
        target = self.path(name)
        try:
            handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        except OSError as error:
            raise CacheError(
                "No file can be made here that only one process can make.",
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
        """Only one process can move a lock away; one that was taken over meanwhile is put back."""
        aside = temporary_of(self.path(lock))
        try:
            self.path(lock).rename(aside)
        except FileNotFoundError:
            return
        if (moved := aside.read_bytes()) != holder:
            self.write_new(lock, moved)
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
        """What processes of other machines left goes once it was seen unchanged for long (`_unchanged_s`)."""
        gone = []
        for path in self.root.rglob(f"*{TEMPORARY_SUFFIX}"):
            if is_abandoned(path, self._unchanged_s(path)):
                path.unlink(missing_ok=True)
                gone.append(path)
        for path in self.root.rglob(f"*{LOCK_SUFFIX}"):
            name = str(path.relative_to(self.root))
            holder = self._read_if_there(name)
            if holder is None or not is_stale(holder, self._unchanged_s(path)):
                continue
            if self._read_if_there(name) == holder:  # nobody has taken it over
                path.unlink(missing_ok=True)
                gone.append(path)
        return sorted(str(path.relative_to(self.root)) for path in gone)

    def _unchanged_s(self, path: Path) -> float:
        """For how long this object has seen the file as it is, by the clock of this machine: file systems
        and other machines have clocks of their own, which may be off by any time."""
        try:
            status = path.stat()
        except FileNotFoundError:
            return 0.0
        state, now = (status.st_ino, status.st_size, status.st_mtime_ns), time.monotonic()
        if path not in self._seen or self._seen[path][0] != state:
            self._seen[path] = state, now
        return now - self._seen[path][1]


def client_options(url: str) -> dict[str, Any]:
    """What fsspec is told for a URL, beside what the user tells it (FSSPEC_S3): when to give up on it."""
    if url.partition("://")[0] in ("http", "https") and find_spec("aiohttp") is not None:
        from aiohttp import ClientTimeout

        return {
            "client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=_HTTP_S, sock_read=_HTTP_S)}
        }
    if url.partition("://")[0] not in ("s3", "s3a") or find_spec("s3fs") is None:
        return {}
    from teachercache.pipeline.places.s3_patience import PatientSession

    stated = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    return {"config_kwargs": {"http_session_cls": PatientSession, **stated}}


class RemoteStorage(Storage):
    """A prefix on an object store, through fsspec. A file appears when its upload completes.

    Nothing is remembered of listings, because other machines write to the same place. Requests that fail
    for the moment (5xx, throttling, timeouts) are repeated by the client library, s3fs for S3, and reads
    once more here.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        options = client_options(self.url)
        self.filesystem, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False, **options)

    def _path(self, name: str) -> str:
        return f"{self._root}/{safe_name(name)}"

    def _open(self, name: str) -> IO[bytes]:
        file: IO[bytes] = self.filesystem.open(self._path(name), "rb")
        return file

    def _read(self, name: str) -> bytes:
        data: bytes = self.filesystem.cat_file(self._path(name))
        return data

    def _read_range(self, name: str, offset: int, nbytes: int) -> bytes:
        if not nbytes:
            return b""
        try:
            data: bytes = self.filesystem.cat_file(self._path(name), start=offset, end=offset + nbytes)
        except OSError as error:
            if is_passing(error) or isinstance(error, StorageError):
                raise
            size = self.size(name)
            if size is not None and size <= offset:  # object stores refuse a range without a byte
                return b""
            raise
        return data

    def read_ranges(self, names: Sequence[str], offsets: Sequence[int], nbytes: Sequence[int]) -> list[bytes]:
        paths = [self._path(name) for name in names]
        ends = [offset + length for offset, length in zip(offsets, nbytes, strict=True)]
        data: list[bytes] = retrying(
            lambda: self.filesystem.cat_ranges(paths, list(offsets), ends, on_error="raise"),
            f"{self.url}/{names[0]}" if len(set(names)) == 1 else f"one of {len(names)} files in {self.url}",
        )
        return data

    def each(self, read: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        return list(self._threads.map(read, items))

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_REMOTE_THREADS, thread_name_prefix="remote")

    def write(self, name: str, data: Buffer) -> None:
        self.filesystem.pipe_file(self._path(name), bytes(data))  # one PUT, where open_write makes several

    def write_new(self, name: str, data: bytes) -> bool:
        try:
            self.filesystem.pipe_file(self._path(name), data, mode="create")
        except FileExistsError:
            return False
        return True

    @contextmanager
    def open_write(self, name: str) -> Iterator[ChecksumWriter]:
        file = self.filesystem.open(self._path(name), "wb", autocommit=False)
        try:
            yield ChecksumWriter(file)
            file.close()
        except BaseException:
            file.discard()
            if isinstance(file, AbstractBufferedFile):
                file.closed = True  # or it would be flushed when it is collected
            raise
        file.commit()

    def _size(self, name: str) -> int | None:
        try:
            entry = self.filesystem.info(self._path(name))
        except FileNotFoundError:
            return None
        return entry["size"] if entry["type"] == "file" else None

    def _names(self, folder: str) -> list[str]:
        try:
            entries = self.filesystem.ls(self._path(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(PurePosixPath(entry).name for entry in entries)

    def walk(self, folder: str = "") -> Iterator[tuple[str, int]]:
        pending = [self._path(folder) if folder else self._root]
        while pending:
            path = pending.pop()
            found = retrying(partial(self.filesystem.ls, path, detail=True), path)
            listed = sorted(found, key=lambda entry: entry["name"])
            for entry in listed:
                if entry["type"] == "file" and entry["name"] != path:
                    yield entry["name"].removeprefix(f"{self._root}/"), entry["size"]
            pending += [entry["name"] for entry in reversed(listed) if entry["type"] == "directory"]

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every file below `folder` by name, in few requests where the store lists deep folders."""
        found = self._retrying(lambda name: self.filesystem.find(self._path(name), detail=True), folder)
        return {path.removeprefix(f"{self._root}/"): int(entry["size"]) for path, entry in found.items()}

    def remove(self, name: str) -> None:
        try:
            self.filesystem.rm_file(self._path(name))
        except FileNotFoundError:
            return

    def free_bytes(self) -> int | None:
        return None

    def sweep(self) -> list[str]:
        return []
