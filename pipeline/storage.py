"""Where bytes live: a local folder, or any `fsspec` URL (`s3://bucket/prefix`, `memory://…`).

Everything a cache writes goes through `Storage`, because the commit protocol rests on its promise:
a name either does not exist or holds all of its bytes. Locally that is temporary name → fsync →
rename → fsync of the folder; on an object store it is a single PUT (or a completed multipart upload).
"""

from __future__ import annotations

import os
import platform
import shutil
import stat
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

import fsspec
import xxhash
from typing_extensions import Buffer

from pipeline.errors import CacheError

TEMPORARY_SUFFIX = ".partial"
_READ_BLOCK = 1 << 22
_REMOTE_WRITER_TIMEOUT_S = 24 * 3600.0


class ChecksumWriter:
    """A write-only file that hashes what passes through: one pass over the bytes, none to verify."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = xxhash.xxh3_128()
        self.nbytes = 0

    def write(self, data: Buffer) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.nbytes += memoryview(data).nbytes

    @property
    def checksum(self) -> str:
        return self._hash.hexdigest()


class Storage(ABC):
    """A folder of whole files. Names are relative POSIX paths and cannot leave the folder."""

    url: str

    @staticmethod
    def at(url: str | os.PathLike[str]) -> Storage:
        """The storage at a local path or an fsspec URL."""
        text = os.fspath(url)
        if "://" in text and not text.startswith("file://"):
            return RemoteStorage(text)
        return LocalStorage(text.removeprefix("file://"))

    @abstractmethod
    def open_read(self, name: str) -> IO[bytes]: ...

    @abstractmethod
    def open_write(self, name: str) -> Any:
        """Context manager yielding a `ChecksumWriter`; the name appears, whole, when it exits cleanly."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a file, or None when it does not exist."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Sorted base names of the finished files directly in `folder` (empty when it is missing)."""

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
        """Delete the temporary files that dead processes left behind; returns their names."""

    def read(self, name: str) -> bytes:
        with self.open_read(name) as file:
            return file.read()

    @abstractmethod
    def read_range(self, name: str, offset: int, nbytes: int) -> bytes:
        """`nbytes` bytes from `offset`: fewer where the file ends, and no memory taken for the rest."""

    def write(self, name: str, data: Buffer) -> None:
        with self.open_write(name) as file:
            file.write(data)

    def exists(self, name: str) -> bool:
        return self.size(name) is not None

    def checksum(self, name: str) -> str:
        """xxh3-128 of a file's bytes, in hex."""
        digest = xxhash.xxh3_128()
        with self.open_read(name) as file:
            while block := file.read(_READ_BLOCK):
                digest.update(block)
        return digest.hexdigest()


def safe_name(name: str) -> str:
    """`name`, if it is a relative path that stays inside its folder; names come from files we read."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise CacheError(
            "A file name in this cache would leave its folder.",
            got=repr(name),
            expected="a relative path without '..'",
            do="do not use this cache: it was damaged or made to do harm",
        )
    return str(path)


class LocalStorage(Storage):
    """A folder on a local (or mounted) file system."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).expanduser().absolute()
        self.url = str(self.root)

    def path(self, name: str) -> Path:
        return self.root / safe_name(name)

    def open_read(self, name: str) -> IO[bytes]:
        return self.path(name).open("rb")

    def read_range(self, name: str, offset: int, nbytes: int) -> bytes:
        _require_range(name, offset, nbytes)
        with self.open_read(name) as file:
            rest = os.fstat(file.fileno()).st_size - offset
            if rest <= 0:
                return b""
            file.seek(offset)
            return file.read(min(nbytes, rest))

    @contextmanager
    def open_write(self, name: str) -> Iterator[ChecksumWriter]:
        target = self.path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.{_writer_tag()}{TEMPORARY_SUFFIX}")
        try:
            with temporary.open("xb") as file:
                yield ChecksumWriter(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _fsync_folder(target.parent)

    def size(self, name: str) -> int | None:
        try:
            status = self.path(name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def names(self, folder: str) -> list[str]:
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
            status = (self.root / prefix).stat()
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                continue
            with os.scandir(self.root / prefix) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
            for entry in listed:
                if entry.is_file() or (entry.is_symlink() and not entry.is_dir()):
                    yield prefix + entry.name, entry.stat(follow_symlinks=entry.is_file()).st_size
            folders = [f"{prefix}{entry.name}/" for entry in listed if entry.is_dir()]
            pending += [(name, above | {identity}) for name in reversed(folders)]

    def remove(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        existing = self.root
        while not existing.exists():
            existing = existing.parent
        return shutil.disk_usage(existing).free

    def sweep(self) -> list[str]:
        stale = [path for path in self.root.rglob(f"*{TEMPORARY_SUFFIX}") if not _may_be_alive(path)]
        for path in stale:
            path.unlink(missing_ok=True)
        return sorted(str(path.relative_to(self.root)) for path in stale)


def _require_range(name: str, offset: int, nbytes: int) -> None:
    if offset < 0 or nbytes < 0:  # offsets, too, come from files we read
        raise CacheError(f"{nbytes} bytes from {offset} are no bytes of {name}.")


def _writer_tag() -> str:
    return f"{platform.node()}~{os.getpid()}~{uuid.uuid4().hex[:8]}"


def _may_be_alive(temporary: Path) -> bool:
    """Whether the process that writes this file may still run: it does here, or wrote elsewhere lately."""
    try:
        tag = temporary.name.removesuffix(TEMPORARY_SUFFIX).split("~")
        if tag[0].endswith(f".{platform.node()}"):
            return Path(f"/proc/{int(tag[1])}").exists()
        return time.time() - temporary.stat().st_mtime < _REMOTE_WRITER_TIMEOUT_S
    except (FileNotFoundError, IndexError, ValueError):
        return False


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class RemoteStorage(Storage):
    """A prefix on an object store, through fsspec. A file appears when its upload completes.

    Nothing is remembered of listings, because other machines write to the same place. Requests that fail
    for the moment (5xx, throttling, timeouts) are repeated by the client library, s3fs for S3.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.filesystem, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)

    def _path(self, name: str) -> str:
        return f"{self._root}/{safe_name(name)}"

    def open_read(self, name: str) -> IO[bytes]:
        file: IO[bytes] = self.filesystem.open(self._path(name), "rb")
        return file

    def read(self, name: str) -> bytes:
        data: bytes = self.filesystem.cat_file(self._path(name))
        return data

    def read_range(self, name: str, offset: int, nbytes: int) -> bytes:
        _require_range(name, offset, nbytes)
        if not nbytes:
            return b""
        try:
            data: bytes = self.filesystem.cat_file(self._path(name), start=offset, end=offset + nbytes)
        except OSError:
            size = self.size(name)
            if size is not None and size <= offset:  # object stores refuse a range without a byte
                return b""
            raise
        return data

    def write(self, name: str, data: Buffer) -> None:
        self.filesystem.pipe_file(self._path(name), bytes(data))  # one PUT, where open_write makes several

    @contextmanager
    def open_write(self, name: str) -> Iterator[ChecksumWriter]:
        file = self.filesystem.open(self._path(name), "wb", autocommit=False)
        try:
            yield ChecksumWriter(file)
            file.close()
        except BaseException:
            file.discard()
            file.closed = True  # or it would be flushed when it is collected
            raise
        file.commit()

    def size(self, name: str) -> int | None:
        try:
            entry = self.filesystem.info(self._path(name))
        except FileNotFoundError:
            return None
        return entry["size"] if entry["type"] == "file" else None

    def names(self, folder: str) -> list[str]:
        try:
            entries = self.filesystem.ls(self._path(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(PurePosixPath(entry).name for entry in entries)

    def walk(self, folder: str = "") -> Iterator[tuple[str, int]]:
        pending = [self._path(folder) if folder else self._root]
        while pending:
            path = pending.pop()
            listed = sorted(self.filesystem.ls(path, detail=True), key=lambda entry: entry["name"])
            for entry in listed:
                if entry["type"] == "file" and entry["name"] != path:
                    yield entry["name"].removeprefix(f"{self._root}/"), entry["size"]
            pending += [entry["name"] for entry in reversed(listed) if entry["type"] == "directory"]

    def remove(self, name: str) -> None:
        try:
            self.filesystem.rm_file(self._path(name))
        except FileNotFoundError:
            return

    def free_bytes(self) -> int | None:
        return None

    def sweep(self) -> list[str]:
        return []
