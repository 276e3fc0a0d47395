"""The tars that we write, for plain `webdataset`: of images, and of features, one safetensors per row.

docs/cache_format.md has the files. `webdataset` reads only in order; by the last member of a tar of features,
`__index__`, a row takes one read: a little-endian (offset, nbytes, crc32c) of uint64 for each row,
zeros for an absent one; then the crc32c of all that. No torch here: `inspect` reads the index too.

Tars are written by hand since `webdataset.TarWriter` does not say where a member begins, as the index does.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial

import google_crc32c
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from pydantic_core import from_json
from safetensors import SafetensorError

from teachercache.pipeline.places.files import ChecksumWriter
from teachercache.pipeline.places.storage import Storage
from teachercache.pipeline.records.array_layout import ArrayLayout, stored_layout
from teachercache.pipeline.records.rows import RowIndex
from teachercache.pipeline.records.spec import CacheSpec
from teachercache.pipeline.stores import shard_format
from teachercache.pipeline.stores.feature_store import Arrays, FeatureStore, NewFiles, ShardWriter, unreadable

INDEX_NAME = "__index__"
_COLUMNS = 3
_KEPT_INDEXES = 1024
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
    padding = -shard_format.index_nbytes(num_rows, _COLUMNS) % tarfile.BLOCKSIZE
    return shard_format.read_index(storage, name, num_rows, _COLUMNS, behind=padding + len(TAR_END))


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


class TarShardWriter(ShardWriter):
    def __init__(self, store: WebDatasetStore, teacher: str, shard: int) -> None:
        samples, views, _ = RowIndex(store.spec.segments).locate(store.spec.shard_rows(shard))
        self._members = [
            f"{member_key(store.key(sample))}.{view}.safetensors"
            for sample, view in zip(samples.tolist(), views.tolist(), strict=True)
        ]
        super().__init__(store, teacher, shard)
        (self._file,) = self._files.values()
        self._index = np.zeros((store.spec.rows_per_shard, _COLUMNS), "<u8")

    def write(self, offsets: Sequence[int], arrays: Mapping[str, NDArray]) -> None:
        assert arrays.keys() == self._layouts.keys(), (arrays.keys(), self._layouts.keys())
        data = {
            name: np.ascontiguousarray(arrays[name], layout.dtype) for name, layout in self._layouts.items()
        }
        for place, offset in enumerate(offsets):
            row = safetensors.numpy.save({name: values[place] for name, values in data.items()})
            start = add_member(self._file, self._members[offset], row)
            self._index[offset] = start, len(row), google_crc32c.value(row)

    def _end(self) -> None:
        add_member(self._file, INDEX_NAME, index_bytes(self._index))
        self._file.write(TAR_END)


def load_rows(files: Iterable[bytes], out: Arrays) -> None:
    """Fill the arrays of `out`. Raises `ValueError`, `KeyError`, `SafetensorError` for other files."""
    for number, data in enumerate(files):
        tensors = safetensors.numpy.load(data)
        for array, values in out.items():
            tensor = tensors[array]
            if (tensor.dtype, tensor.shape) != (values.dtype, values.shape[1:]):
                raise ValueError(f"{array} of row {number} is {tensor.dtype} {tensor.shape}")
            values[number] = tensor


def _description_file(teacher: str) -> str:
    return f"teachers/{teacher}/teacher.json"


class WebDatasetStore(FeatureStore):
    def __init__(self, storage: Storage, spec: CacheSpec) -> None:
        super().__init__(storage, spec)
        self._read_index = lru_cache(_KEPT_INDEXES)(partial(read_tar_index, storage))

    def layout_files(self, teacher: str | None) -> dict[str, bytes]:
        if teacher is None:
            return {}
        layouts = self.layouts(teacher).items()
        arrays = {name: vars(layout) | {"dtype": layout.dtype.name} for name, layout in layouts}
        description = self._description(teacher) | {"arrays": arrays}
        return {_description_file(teacher): (json.dumps(description, indent=1) + "\n").encode()}

    def _stored_layouts(self, teacher: str) -> dict[str, ArrayLayout]:
        try:
            arrays = from_json(self.storage.read(_description_file(teacher)))["arrays"]
            return {name: stored_layout(**array) for name, array in arrays.items()}
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{_description_file(teacher)}: {type(error).__name__}: {error}") from error

    def shard_files(self, teacher: str, shard: int) -> list[str]:
        return [tar_name(teacher, shard)]

    def write_shard(self, teacher: str, shard: int) -> TarShardWriter:
        return TarShardWriter(self, teacher, shard)

    def read(self, teacher: str, rows: NDArray[np.int64], out: Arrays) -> None:
        try:
            shards, places = np.divmod(rows, self.spec.rows_per_shard)
            distinct, which = np.unique(shards, return_inverse=True)
            names = [tar_name(teacher, shard) for shard in distinct.tolist()]
            indexes = self.storage.each(lambda name: self._read_index(name, self.spec.rows_per_shard), names)
            files = read_rows(
                self.storage, [names[i] for i in which], [indexes[i] for i in which], places.tolist()
            )
            load_rows(files, out)
        except (ValueError, KeyError, FileNotFoundError, SafetensorError) as error:
            raise unreadable(self.storage, teacher, error) from error
