"""The tars that we write: of images, and of features, whose last member, `__index__`, is an index of rows.

A little-endian (offset, nbytes, crc32c) of uint64 for each row of the shard, zeros for an absent one; then
the crc32c of all that. This module does not import torch, since `inspect` reads the index too.

Tars are written by hand since `webdataset.TarWriter` does not say where a member begins, which the index
needs; there is an index since `webdataset` reads only in order.
"""

import tarfile
from collections.abc import Sequence

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from teachercache.pipeline.places.files import ChecksumWriter
from teachercache.pipeline.places.storage import Storage
from teachercache.pipeline.stores import shard_format
from teachercache.pipeline.stores.feature_store import NewFiles

INDEX_NAME = "__index__"
COLUMNS = 3
TAR_END = bytes(2 * tarfile.BLOCKSIZE)
_SUFFIXES = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"RI": ".webp"}
_SUFFIXES |= {b"GI": ".gif", b"BM": ".bmp", b"II": ".tif", b"MM": ".tif"}

TarIndex = NDArray[np.uint64]  # (rows, 3)


def tar_name(teacher: str, shard: int) -> str:
    return f"teachers/{teacher}/{shard:05d}.tar"


def image_tar_name(shard: int) -> str:
    return f"images/{shard:05d}.tar"


def member_key(key: str) -> str:
    """A sample's key as the name of a member: `webdataset` cuts names at the first dot of their last part.

    Dots there are percent-encoded, and so are "%" and two underscores at the start of a key, since
    `webdataset` skips members named `__…__`; `urllib.parse.unquote` is the inverse.
    """
    folder, slash, name = key.rpartition("/")
    member = folder + slash + name.replace("%", "%25").replace(".", "%2E")
    return f"%5F{member[1:]}" if member.startswith("__") else member


def add_member(tar: ChecksumWriter, name: str, data: bytes) -> int:
    """Append a file to a tar; returns where its bytes begin. Write `TAR_END` after the last one.

    `tarfile` would seek, but files on an object store are written in one go.
    """
    header = tarfile.TarInfo(name)
    header.size = len(data)
    tar.write(header.tobuf(tarfile.PAX_FORMAT))
    start = tar.nbytes
    tar.write(data)
    tar.write(bytes(-len(data) % tarfile.BLOCKSIZE))
    return start


class ImageTarWriter(NewFiles):
    """Copies of a shard's source images, byte for byte.

    `members` are the byte ranges (offset, nbytes) of the images added so far, (0, 0) for an absent one."""

    def __init__(self, storage: Storage, shard: int) -> None:
        name = image_tar_name(shard)
        super().__init__(storage, [name])
        self._file = self._files[name]
        self.members: list[tuple[int, int]] = []

    def add(self, key: str, image: bytes | None) -> None:
        """Add the next sample of the shard; None stands for one that cannot be decoded."""
        if image is None:
            self.members.append((0, 0))
            return
        start = add_member(self._file, member_key(key) + _SUFFIXES.get(image[:2], ".img"), image)
        self.members.append((start, len(image)))

    def _end(self) -> None:
        self._file.write(TAR_END)


def index_bytes(index: TarIndex) -> bytes:
    table = index.tobytes()
    return table + shard_format.checksum(table)


def read_tar_index(storage: Storage, name: str, num_rows: int) -> TarIndex:
    """The index of a tar. Raises `ValueError` unless it is whole and every row lies before it."""
    padding = -shard_format.index_nbytes(num_rows, COLUMNS) % tarfile.BLOCKSIZE
    return shard_format.read_index(storage, name, num_rows, COLUMNS, behind=padding + len(TAR_END))


def read_rows(
    storage: Storage, names: Sequence[str], indexes: Sequence[TarIndex], places: Sequence[int]
) -> list[bytes]:
    """The safetensors of rows, each from a tar with its index. Raises `ValueError` for a row that is absent
    or differs from what the index states."""
    entries = [index[place].tolist() for index, place in zip(indexes, places, strict=True)]
    for name, place, (_, nbytes, _) in zip(names, places, entries, strict=True):
        if not nbytes:
            raise ValueError(f"{name} holds no row {place}")
    offsets, lengths = ([entry[column] for entry in entries] for column in (0, 1))
    rows = storage.read_ranges(names, offsets, lengths)
    for name, place, row, (_, nbytes, expected) in zip(names, places, rows, entries, strict=True):
        if len(row) != nbytes or google_crc32c.value(row) != expected:
            raise ValueError(f"{name}: the checksum of row {place} is wrong")
    return rows
