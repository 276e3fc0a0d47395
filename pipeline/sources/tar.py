"""Which byte ranges of a tar hold its files. `tarfile` reads the headers; nothing is extracted."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO


@dataclass(frozen=True, slots=True)
class TarMember:
    """A regular file in a tar, or (with a `problem`) the place from which a tar cannot be read."""

    name: str
    offset: int
    nbytes: int
    problem: str | None = None


def tar_members(file: IO[bytes], start: int, end: int) -> Iterator[TarMember]:
    """The regular files of the tar that lies in bytes [start, end) of `file`, lazily, in order.

    A tar that is cut or damaged gives all members before the damage, and then the damage itself: the
    last item has a `problem` (and the name of the member that was cut, if it had one). A tar without
    the zero block that ends every tar counts as cut. `file` may be read from between two items.
    """
    position = start
    file.seek(start)
    try:
        tar = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
        while (info := tar.next()) is not None and info.offset < end:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header
            if tar.offset <= position:
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
