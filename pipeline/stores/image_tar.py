"""Copies of a shard's source images, byte for byte, in one tar that `webdataset` can read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from teachercache.pipeline.places.files import ChecksumWriter
from teachercache.pipeline.places.storage import Storage
from teachercache.pipeline.records.manifest import FileRecord
from teachercache.pipeline.stores.tar_index import TAR_END, add_member, member_key

_SUFFIXES = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"RI": ".webp"}
_SUFFIXES |= {b"GI": ".gif", b"BM": ".bmp", b"II": ".tif", b"MM": ".tif"}


def image_tar_name(shard: int) -> str:
    return f"images/{shard:05d}.tar"


class ImageTarWriter:
    """`members` are the byte ranges (offset, nbytes) of the images added so far, (0, 0) for an absent one."""

    def __init__(self, name: str, file: ChecksumWriter) -> None:
        self._name, self._file = name, file
        self.members: list[tuple[int, int]] = []

    @classmethod
    @contextmanager
    def open(cls, storage: Storage, shard: int) -> Iterator[ImageTarWriter]:
        name = image_tar_name(shard)
        with storage.open_write(name) as file:
            yield cls(name, file)
            file.write(TAR_END)

    def add(self, key: str, image: bytes | None) -> None:
        """The next sample of the shard; None keeps the place of one that cannot be decoded."""
        if image is None:
            self.members.append((0, 0))
            return
        start = add_member(self._file, member_key(key) + _SUFFIXES.get(image[:2], ".img"), image)
        self.members.append((start, len(image)))

    def files(self) -> dict[str, FileRecord]:
        return {self._name: FileRecord.of(self._file)}
