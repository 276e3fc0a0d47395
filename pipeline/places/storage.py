"""Where bytes live: a local folder, or any `fsspec` URL (`s3://bucket/prefix`, `memory://…`).

Everything a cache writes goes through `Storage`, because the commit protocol relies on its promise:
a name either does not exist or holds all of its bytes. Locally that is temporary name → fsync →
rename → fsync of the folder; on an object store it is a single PUT (or a completed multipart upload).
"""

import io
import posixpath
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, TypeVar

import xxhash
from typing_extensions import Buffer

from teachercache.pipeline.errors import CacheError, DiskSpaceError, TeacherCacheError, place_error
from teachercache.pipeline.places.files import HEAD_NBYTES, TAIL_NBYTES, RereadFile, ends_hash
from teachercache.pipeline.places.locks import Lockable
from teachercache.pipeline.places.retries import retrying

_READ_BLOCK = 1 << 22

Item = TypeVar("Item")
Result = TypeVar("Result")


class Storage(Lockable):
    """A folder of whole files. Names are relative POSIX paths and cannot leave the folder.

    A read that fails temporarily is repeated (`retrying`), and raises `StorageError`, with the file's name,
    when it keeps failing. `if_absent`: what to do where there is no cache.
    """

    if_absent = "check the path, or build the cache first"

    def open_read(self, name: str) -> IO[bytes]:
        return io.BufferedReader(RereadFile(lambda: self._open(name), f"{self.url}/{name}"))

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
        """(name, bytes) of every file below `folder`, lazily, in the same order on every system.

        The files of a folder come before its subfolders, each sorted by name. Symbolic links are
        followed; a dangling one is listed as the file it claims to be, and a link to a folder above is not
        entered. Raises `FileNotFoundError` for a missing folder.
        """

    def free_bytes(self) -> int | None:
        """Bytes that can still be written, or None where that has no meaning (object stores)."""
        return None

    def sweep(self) -> list[str]:
        """Delete temporary files and locks that dead processes left on a disk; returns their names."""
        return []

    def read(self, name: str) -> bytes:
        return self._retrying(self._read, name)

    def _retrying(self, read: Callable[..., Result], name: str, *rest: int) -> Result:
        return retrying(lambda: read(name, *rest), f"{self.url}/{name}")

    @abstractmethod
    def _read(self, name: str) -> bytes: ...

    def read_range(self, name: str, offset: int, nbytes: int) -> bytes:
        """`nbytes` bytes from `offset`, or fewer (and no memory for the rest) where the file ends."""
        if offset < 0 or nbytes < 0:  # offsets, too, come from files we read
            raise CacheError(f"{name} has no range of {nbytes} bytes from {offset}.")
        return self._retrying(self._read_range, name, offset, nbytes)

    @abstractmethod
    def _read_range(self, name: str, offset: int, nbytes: int) -> bytes: ...

    def read_ranges(self, names: Sequence[str], offsets: Sequence[int], nbytes: Sequence[int]) -> list[bytes]:
        """`read_range` of several files, at once where that is faster."""
        return [self.read_range(*one) for one in zip(names, offsets, nbytes, strict=True)]

    def ends(self, names: Sequence[str], sizes: Sequence[int]) -> list[str]:
        """xxh3-64, in hex, of the first 4 and the last 64 KiB of files that should have these sizes.

        Distinguishes files at the cost of two small reads each. Raises `FileNotFoundError`.
        """
        starts = [*(0 for _ in sizes), *(max(0, size - TAIL_NBYTES) for size in sizes)]
        lengths = [min(size, most) for most in (HEAD_NBYTES, TAIL_NBYTES) for size in sizes]
        parts = self.read_ranges([*names, *names], starts, lengths)
        return [ends_hash(*pair) for pair in zip(parts[: len(names)], parts[len(names) :], strict=True)]

    def each(self, read: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """The result of `read` for each item, in parallel where every read waits for an answer."""
        return [read(item) for item in items]

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
    if not name or name.startswith("/") or ".." in name.split("/") or "\\" in name or "\0" in name:
        raise CacheError(
            "A file name in this cache would leave its folder.",
            got=repr(name),
            expected="a relative path without '..'",
            do="do not use this cache: it was damaged or made to do harm",
        )
    return posixpath.normpath(name)


@contextmanager
def first_contact(storage: Storage) -> Iterator[None]:
    """Turn any error of a store that cannot be reached into a `CacheError`."""
    try:
        yield
    except (TeacherCacheError, FileNotFoundError, NotADirectoryError):
        raise
    except Exception as error:  # every object store has its own errors for hosts, buckets and credentials
        raise CacheError(
            "This place cannot be read.",
            got=f"{type(error).__name__}: {error}",
            expected=f"{storage.url}, reachable and readable with your credentials",
            do="check the URL; for s3:// also AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, "
            "for hf:// HF_TOKEN",
        ) from error


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
