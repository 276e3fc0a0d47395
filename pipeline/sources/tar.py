"""Images in tars, by byte range. `tarfile` reads the headers; nothing is extracted."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import IO, NamedTuple, Self

from pipeline.sources.base import Source

_PLAIN_KINDS = (tarfile.REGTYPE, tarfile.XHDTYPE)


class TarMember(NamedTuple):
    """A regular file in a tar, or (with a `problem`) the place from which a tar cannot be read."""

    name: str
    offset: int
    nbytes: int
    problem: str | None = None


class _Header(tarfile.TarInfo):
    """A header of which, in the plain case, only type, name and size are parsed: twice as fast a scan."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        kind = bytes(buf[156:157])
        checksum = b"%06o" % (sum(buf) - sum(buf[148:156]) + 8 * ord(" "))
        whole = len(buf) == tarfile.BLOCKSIZE and buf[148:154] == checksum
        if not (whole and kind in _PLAIN_KINDS and buf[257:263] == b"ustar\0" and buf[124] < 0x80):
            return super().frombuf(buf, encoding, errors)
        prefix, name = (bytes(part).partition(b"\0")[0] for part in (buf[345:500], buf[:100]))
        header = cls((prefix + b"/" + name if prefix else name).decode(encoding, errors))
        header.type = kind
        header.size = int(buf[124:136].rstrip(b"\0 ") or b"0", 8)
        return header


def tar_members(file: IO[bytes], start: int, end: int) -> Iterator[TarMember]:
    """The regular files of the tar that lies in bytes [start, end) of `file`, lazily, in order.

    A tar that is cut or damaged gives all members before the damage, and then the damage itself: the
    last item has a `problem` (and the name of the member that was cut, if it had one). A tar without
    the zero block that ends every tar counts as cut. `file` may be read from between two items.
    """
    position = start
    file.seek(start)
    try:
        tar = tarfile.TarFile(fileobj=file, tarinfo=_Header, encoding="utf-8", errors="surrogateescape")
        while (info := tar.next()) is not None and info.offset < end:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header
            if tar.offset <= position or info.size < 0:
                raise tarfile.ReadError("a header points backwards")
            stop = info.offset_data + info.size
            if info.isreg() and not info.issparse():
                name = info.name.removeprefix("./")
                if stop > end:
                    problem = f"the tar is cut: this member ends at byte {stop:,}, the tar at {end:,}"
                    yield TarMember(name, info.offset_data, max(end - info.offset_data, 0), problem)
                    return
                yield TarMember(name, info.offset_data, info.size)
            position = tar.offset
    except (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        yield TarMember("", position, 0, f"the tar is damaged at byte {position:,}: {error}")
        return
    file.seek(position)
    last = file.read(tarfile.BLOCKSIZE) if position + tarfile.BLOCKSIZE <= end else b""
    if last != bytes(tarfile.BLOCKSIZE):
        what = "damaged" if last else "cut"
        yield TarMember("", position, 0, f"the tar is {what} at byte {position:,}: no header, no end mark")


def read_range(file: IO[bytes], offset: int, nbytes: int) -> bytes:
    file.seek(offset)
    return file.read(nbytes)


class TarSource(Source):
    """A tar, or the tars of a folder or pattern."""

    def _tars(self) -> Iterator[tuple[str, int]]:
        return self._containers(".tar")

    def _names(self) -> Iterator[str]:
        yield from super()._names()
        for path, nbytes in self._tars():
            with self.place.storage.open_read(path) as file:
                yield from (f"{path}/{member.name}" for member in tar_members(file, 0, nbytes))
