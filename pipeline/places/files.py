"""The files that a storage opens: hashed as they are written, and read again where a read fails."""

import io
import os
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any, TypeVar

import xxhash
from typing_extensions import Buffer

from teachercache.pipeline.places.retries import retrying

Answer = TypeVar("Answer")
HEAD_NBYTES, TAIL_NBYTES = 1 << 12, 1 << 16  # the tail holds the index of up to 4,000 rows


class ChecksumWriter:
    """A write-only file that hashes the bytes as they pass, so that they need not be read for that."""

    closed = False  # pyarrow asks

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = xxhash.xxh3_128()
        self._head, self._tail = b"", bytearray()
        self.nbytes = 0

    def write(self, data: Buffer) -> None:
        self._file.write(data)
        self._hash.update(data)
        view = memoryview(data).cast("B")
        self._head += view[: HEAD_NBYTES - len(self._head)]
        self._tail += view[-TAIL_NBYTES:]
        if len(self._tail) > 8 * TAIL_NBYTES:
            del self._tail[:-TAIL_NBYTES]
        self.nbytes += len(view)

    @property
    def checksum(self) -> str:
        return self._hash.hexdigest()

    @property
    def ends(self) -> str:
        """As `Storage.ends`."""
        return ends_hash(self._head, bytes(self._tail[-TAIL_NBYTES:]))


def ends_hash(head: bytes, tail: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(head + tail)


class RereadFile(io.RawIOBase):
    """A file that is reopened, at the same position, when a read of it fails temporarily."""

    def __init__(self, open_file: Callable[[], IO[bytes]], what: str) -> None:
        self._open_file, self._what = open_file, what
        self._place = 0
        self._file: IO[bytes] | None = None
        self._ask(lambda file: None)

    def _ask(self, question: Callable[[Any], Answer]) -> Answer:
        def once() -> Answer:
            if self._file is None:
                self._file = self._open_file()
            return question(self._file)

        return retrying(once, self._what, again=self._forget)

    def _forget(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # it may be closed because it fails
                self._file.close()
            self._file = None

    def readinto(self, buffer: Any) -> int:
        def read(file: Any) -> int:
            file.seek(self._place)
            return file.readinto(buffer) or 0

        nbytes = self._ask(read)
        self._place += nbytes
        return nbytes

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            offset += self._ask(lambda file: file.seek(0, os.SEEK_END))
        self._place = offset + self._place if whence == os.SEEK_CUR else offset
        return self._place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._forget()
        super().close()
