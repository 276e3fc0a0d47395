"""Images in tars, by byte range or streamed by `webdataset`. `tarfile` reads headers; nothing is unpacked."""

import logging
import math
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import BytesIO
from itertools import pairwise
from posixpath import basename, dirname, normpath, splitext
from posixpath import join as join_path
from typing import IO, Any, NamedTuple, Self

from teachercache.pipeline.errors import SourceError
from teachercache.pipeline.sources.keys import printable
from teachercache.pipeline.sources.source import SampleRows, Scanned, Source, file_kind, is_image_name

_PLAIN_KINDS = (tarfile.REGTYPE, tarfile.XHDTYPE)
_LONGEST_CHAIN = 40  # of links to links, as in Linux
_LEAST_STREAMED = 16  # images; fewer come sooner side by side
_STREAMED_AT_ONCE = 8 << 20  # bytes of a request


class TarMember(NamedTuple):
    """A regular file in a tar, or (with a `problem`) the place from which a tar cannot be read."""

    name: str
    offset: int
    nbytes: int
    problem: str | None = None


class _Link(NamedTuple):
    """A link with its header at `offset`. A hard link leads to the last file of that name before it."""

    name: str
    offset: int
    target: str
    is_hard: bool


class _Header(tarfile.TarInfo):
    """A header that, in the plain case, parses only type, name and size, which makes scans twice as fast."""

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


def tar_members(
    file: IO[bytes], start: int, end: int, left_out: Counter[str] | None = None
) -> Iterator[TarMember]:
    """The regular files of the tar that lies in bytes [start, end) of `file`, lazily, in order.

    A link to a file in the tar gives a member at the link's position, with the bytes of the file. `left_out`
    counts sparse files and links that lead to no file in the tar. A tar with links is read twice.

    A tar that is cut or damaged gives all members before the damage, and then the damage itself: the
    last item has a `problem` (and the name of the member that was cut, if it had one). A tar without
    the zero block that ends every tar counts as cut. The caller may read from `file` between items.
    """
    entries: dict[str, list[TarMember | _Link]] = {}
    left_out = Counter() if left_out is None else left_out
    for entry in _entries(file, start, end, left_out):
        if isinstance(entry, TarMember):
            yield entry
            continue
        if not entries:
            for other in _entries(file, start, end, Counter()):
                entries.setdefault(other.name, []).append(other)
        if entry.is_hard and entry.target == entry.name:
            continue  # GNU tar's second mention of one file
        if (target := _follow(entry, entries)) is not None:
            yield TarMember(entry.name, target.offset, target.nbytes)
        else:
            left_out["link that leads to no file"] += 1


def _follow(entry: TarMember | _Link, entries: dict[str, list[TarMember | _Link]]) -> TarMember | None:
    """The file that a link leads to, possibly through other links."""
    for _ in range(_LONGEST_CHAIN):
        if isinstance(entry, TarMember):
            return entry if entry.problem is None else None
        at = entry.offset if entry.is_hard else math.inf
        before = [other for other in entries.get(entry.target, ()) if other.offset < at]
        if not before:
            return None
        entry = before[-1]
    return None


def _entries(file: IO[bytes], start: int, end: int, left_out: Counter[str]) -> Iterator[TarMember | _Link]:
    position = start
    file.seek(start)
    try:
        tar = tarfile.TarFile(fileobj=file, tarinfo=_Header, encoding="utf-8", errors="surrogateescape")
        while (info := tar.next()) is not None and info.offset < end:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header
            if tar.offset <= position or info.size < 0:
                raise tarfile.ReadError("a header points backwards")
            stop = info.offset_data + info.size
            name = info.name.removeprefix("./")
            if info.islnk():
                yield _Link(name, info.offset, info.linkname.removeprefix("./"), True)
            elif info.issym():
                yield _Link(name, info.offset, normpath(join_path(dirname(name), info.linkname)), False)
            elif info.issparse():
                left_out["sparse file"] += 1
            elif info.isreg():
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

    container = ".tar"

    def names(self) -> Iterator[str]:
        yield from super().names()
        for path, nbytes in self._containers():
            with self.place.storage.open_read(path) as file:
                yield from (f"{path}/{member.name}" for member in tar_members(file, 0, nbytes))

    @property
    def streams(self) -> bool:
        return not self.is_local

    def stream(self, path: str, places: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        start, end = places[0][0] - tarfile.BLOCKSIZE, sum(places[-1])
        in_order = all(sum(one) <= following for one, (following, _) in pairwise(places))
        dense = 2 * sum(nbytes for _, nbytes in places) >= end - start
        if not self.streams or len(places) < _LEAST_STREAMED or not (in_order and dense):
            return
        span = _Span(partial(self.place.storage.read_range, path), start, end)
        # by where they begin, since names may be cut, and occur twice
        members: Any = {"rename_files": lambda _: span.place, "select_files": dict(places).__contains__}
        try:
            from webdataset.tariterators import tar_file_expander

            found = tar_file_expander([{"url": path, "stream": span}], **members)
            for (offset, _), member in zip(places, found, strict=False):
                if member.get("fname") != offset:
                    return
                yield member["data"]
        except Exception as error:  # whatever it is: `read` says it of the image
            logging.getLogger(__name__).info("%s does not stream: %s", path, error)


class ILSVRCSource(TarSource):
    """`ILSVRC2012_img_train.tar` as ImageNet distributes it: a tar of one tar per class.

    Images stay where they are, two tars deep, and are read by byte range.

    The key is the name of the image, such as `n01440764_10026`; the label is its class, `n01440764`.
    """

    kind = "ilsvrc"

    def units(self) -> Iterator[tuple[str, TarMember]]:
        """(path, member) of outer tars, usually a class."""
        for path, nbytes in self._containers():
            with self.place.storage.open_read(path) as file:
                for member in tar_members(file, 0, nbytes):
                    if is_image_name(member.name):
                        raise SourceError(
                            f"{path} is not a tar of class tars.",
                            got=f"an image in it, {printable(member.name)}",
                            expected="one tar for each class, as in ILSVRC2012_img_train.tar",
                            do="give the path of that tar alone, or set kind: webdataset for a flat one",
                        )
                    yield path, member

    def scan_unit(self, unit: tuple[str, TarMember]) -> Scanned:
        path, outer = unit
        rows, wnid = SampleRows(), splitext(basename(outer.name))[0]
        if _is_class_tar(outer.name):
            with self.place.storage.open_read(path) as file:
                for member in tar_members(file, outer.offset, outer.offset + outer.nbytes, rows.left_out):
                    key = splitext(member.name)[0]
                    if member.problem is not None:
                        rows.reject(path, member.offset, member.nbytes, member.problem, key)
                    elif is_image_name(member.name):
                        read_first = partial(read_range, file, member.offset)
                        rows.add(key, f"{wnid}/{key}", path, member.offset, member.nbytes, wnid, read_first)
                    else:
                        rows.left_out[file_kind(member.name)] += 1
        elif outer.problem is None:
            rows.left_out[file_kind(outer.name)] += 1
        if outer.problem is not None:
            rows.reject(path, outer.offset, outer.nbytes, outer.problem, outer.name)
        return rows.scanned()


def _is_class_tar(name: str) -> bool:
    return splitext(name)[1].lower() == ".tar" and not basename(name).startswith(".")


class _Span:
    """Bytes [place, end) of a tar, 512 at a time: when `tarfile` has read a header, `place` is behind it."""

    def __init__(self, read: Callable[[int, int], bytes], place: int, end: int) -> None:
        self._read, self.place, self._end, self._ahead = read, place, end, BytesIO()

    def read(self, _: int) -> bytes:
        block = self._ahead.read(tarfile.BLOCKSIZE)
        if not block and self.place < self._end:
            self._ahead = BytesIO(self._read(self.place, min(_STREAMED_AT_ONCE, self._end - self.place)))
            block = self._ahead.read(tarfile.BLOCKSIZE)
        self.place += len(block)
        return block
