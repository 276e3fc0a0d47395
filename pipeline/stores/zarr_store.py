"""Features in plain Zarr v3: one group per teacher, one chunk per row, one shard file per committed shard.

Files are written here and not through zarr-python, because a shard has to be streamed (one of SAM's is
gigabytes), fsynced, renamed and hashed as it is written. The format is that of the sharding codec
(`shard_format`, `zarr_metadata`); tests hold these bytes equal to what zarr-python writes.

Uncompressed rows are read without zarr too, each from a local disk by a `pread` into the caller's memory, or
by ranges; docs/design.md says why.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from teachercache.pipeline.places.local_storage import LocalStorage
from teachercache.pipeline.places.retries import retrying
from teachercache.pipeline.places.storage import Storage
from teachercache.pipeline.records.array_layout import ArrayLayout
from teachercache.pipeline.records.spec import CacheSpec
from teachercache.pipeline.stores.feature_store import Arrays, FeatureStore, ShardWriter, unreadable
from teachercache.pipeline.stores.shard_format import (
    ABSENT,
    CHECKSUM_NBYTES,
    Index,
    checksum,
    empty_index,
    index_nbytes,
    parse_index,
    read_index,
)
from teachercache.pipeline.stores.zarr_metadata import (
    array_json,
    chunks_json,
    consolidated_json,
    group_json,
    layout_of,
)

if TYPE_CHECKING:
    from teachercache.pipeline.stores.through_zarr import ThroughZarr

_KEPT_INDEXES = 1024
OPEN_SHARDS = 256  # file descriptors; a shuffling window of 16 shards of three teachers needs about 150

Ints = NDArray[np.int64]


def array_folder(teacher: str, array: str) -> str:
    return f"teachers/{teacher}/{array}"


def shard_file(teacher: str, array: str, shard: int, row_ndim: int) -> str:
    """Zarr's default chunk key: the shard along the row axis, 0 along every other."""
    return f"{array_folder(teacher, array)}/c/{shard}{'/0' * row_ndim}"


class ZarrShardWriter(ShardWriter):
    def __init__(self, store: ZarrStore, teacher: str, shard: int) -> None:
        super().__init__(store, teacher, shard)
        self._compressor = store.spec.compressor
        self._file_of = dict(zip(self._layouts, self._files.values(), strict=True))
        self._index = {array: empty_index(store.spec.rows_per_shard) for array in self._layouts}

    def write(self, offsets: Sequence[int], arrays: Mapping[str, NDArray]) -> None:
        assert arrays.keys() == self._layouts.keys(), (arrays.keys(), self._layouts.keys())
        for array, values in arrays.items():
            file, layout = self._file_of[array], self._layouts[array]
            assert values.shape == (len(offsets), *layout.shape), (array, values.shape, layout.shape)
            data = np.ascontiguousarray(values, layout.dtype)
            for offset, parts in zip(offsets, self._chunks(layout, data), strict=True):
                start = file.nbytes
                for part in parts:
                    file.write(part)
                self._index[array][offset] = start, file.nbytes - start

    def _chunks(self, layout: ArrayLayout, rows: NDArray) -> Iterable[Sequence[bytes | memoryview]]:
        """Each row as it is stored, with its checksum, in parts; rows themselves are not copied."""
        if self._compressor is None:
            views = (row.reshape(-1).view(np.uint8).data for row in rows)
            return ((view, checksum(view)) for view in views)
        from teachercache.pipeline.stores.through_zarr import encoded_rows  # slow to import

        return zip(encoded_rows(chunks_json(layout, len(rows), self._compressor), rows))

    def _end(self) -> None:
        for array, index in self._index.items():
            file, data = self._file_of[array], index.tobytes()
            file.write(bytes.fromhex(file.checksum))
            file.write(data + checksum(data))


class ZarrStore(FeatureStore):
    def __init__(self, storage: Storage, spec: CacheSpec) -> None:
        super().__init__(storage, spec)
        # Not of a method: a store that referred to itself would keep its files open until it is collected.
        self._layout = lru_cache(None)(partial(_read_layout, storage, spec))
        self._read_index = lru_cache(_KEPT_INDEXES)(partial(read_index, storage))

    def layout_files(self, teacher: str | None) -> dict[str, bytes]:
        if teacher is None:
            below = [file for name in self.spec.with_arrays for file in self.layout_files(name).items()]
            teachers = {"teachers/zarr.json": group_json({})}
            return teachers | {"zarr.json": consolidated_json(teachers | dict(below))}
        files = {f"teachers/{teacher}/zarr.json": group_json(self._description(teacher))}
        for name, layout in self.layouts(teacher).items():
            files[f"{array_folder(teacher, name)}/zarr.json"] = array_json(layout, self.spec)
        return dict(sorted(files.items()))

    def shard_files(self, teacher: str, shard: int) -> list[str]:
        layouts = self.layouts(teacher)
        return [shard_file(teacher, array, shard, len(layout.shape)) for array, layout in layouts.items()]

    def write_shard(self, teacher: str, shard: int) -> ZarrShardWriter:
        return ZarrShardWriter(self, teacher, shard)

    def read(self, teacher: str, rows: NDArray[np.int64], out: Arrays) -> None:
        shards, places = np.divmod(rows, self.spec.rows_per_shard)
        for name, values in out.items():
            try:
                self._read_array(teacher, name, shards, places, values)
            except (ValueError, FileNotFoundError, KeyError) as error:  # ValueError: also a wrong checksum
                raise unreadable(self.storage, teacher, error) from error

    def _read_array(self, teacher: str, name: str, shards: Ints, places: Ints, values: NDArray) -> None:
        """Rows at `places` in `shards`."""
        self.chunk_starts(teacher, name, shards, places, values.ndim - 1)
        rows = shards * self.spec.rows_per_shard + places
        self._zarr.read(array_folder(teacher, name), rows, values, self.spec.rows_per_shard)

    @cached_property
    def _zarr(self) -> ThroughZarr:
        from teachercache.pipeline.stores.through_zarr import ThroughZarr  # slow to import, and seldom needed

        return ThroughZarr(self.storage)

    def chunk_starts(self, teacher: str, name: str, shards: Ints, places: Ints, row_ndim: int) -> Index:
        """Where the rows at `places` in `shards` begin in their files, in bytes.

        Raises `ValueError` for rows that a shard does not hold: zarr would return zeros.
        """
        starts = np.empty(len(shards), np.uint64)
        distinct = np.unique(shards).tolist()
        files = [shard_file(teacher, name, shard, row_ndim) for shard in distinct]
        indexes = self.storage.each(lambda file: self._read_index(file, self.spec.rows_per_shard), files)
        for shard, file, index in zip(distinct, files, indexes, strict=True):
            here = shards == shard
            chunks = index[places[here]]
            absent = (chunks == ABSENT).any(1)
            if absent.any():
                raise ValueError(f"{file} holds no row {places[here][absent][0]}")
            starts[here] = chunks[:, 0]
        return starts

    def _stored_layouts(self, teacher: str) -> dict[str, ArrayLayout]:
        names = self.storage.names(f"teachers/{teacher}")
        arrays = [name for name in names if name.isidentifier()]  # no file that others leave
        if not arrays:
            raise FileNotFoundError(f"teachers/{teacher} holds no array")
        return {name: self._layout(teacher, name)[0] for name in arrays}

    def is_as_written(self, teacher: str) -> bool:
        return all(self._layout(teacher, name)[1] for name in self.stored_layouts(teacher))

    def is_plain(self, teacher: str, name: str, values: NDArray) -> bool:
        """Whether a chunk's bytes are a row's in memory, as `create` lays them out."""
        layout, as_written = self._layout(teacher, name)
        plain = as_written and self.spec.compressor is None
        return plain and (layout.dtype, layout.shape) == (values.dtype, values.shape[1:])


def _read_layout(storage: Storage, spec: CacheSpec, teacher: str, name: str) -> tuple[ArrayLayout, bool]:
    file = f"{array_folder(teacher, name)}/zarr.json"
    return layout_of(file, storage.read(file), spec)


class ShardFile:
    """An open shard whose chunks are `row_nbytes` long. Threads and forked processes may share it: reads
    state their offset, so they share no file position.

    Its file is closed when the last reference is gone, so a shard that drops out of the set of open ones
    during a read stays open until the read ends. The index is checked once; the rows' own checksums only on
    request.
    """

    def __init__(self, storage: LocalStorage, name: str, num_rows: int, row_nbytes: int) -> None:
        self._name = name
        self._descriptor = storage.open_descriptor(name)
        weakref.finalize(self, os.close, self._descriptor)
        file_nbytes = os.fstat(self._descriptor).st_size
        start = max(0, file_nbytes - index_nbytes(num_rows))
        end = os.pread(self._descriptor, file_nbytes - start, start)
        index = parse_index(end, num_rows, file_nbytes, name=name)
        sizes = index[index[:, 0] != ABSENT, 1]
        if (sizes != row_nbytes + CHECKSUM_NBYTES).any():
            raise ValueError(f"{name} holds chunks of {np.unique(sizes)} bytes, expected {row_nbytes} and 4")
        self._starts: list[int] = index[:, 0].tolist()

    def read(self, place: int, out: memoryview, verify: bool) -> None:
        """Fill `out` with the row at `place`. Raises `ValueError` if it is absent or damaged."""
        start = self._starts[place]
        if start == ABSENT:
            raise ValueError(f"{self._name} holds no row {place}")
        rest = out
        while rest and (got := os.preadv(self._descriptor, [rest], start)):
            rest, start = rest[got:], start + got
        if rest:
            raise ValueError(f"{self._name} ends inside row {place}")
        if verify and checksum(out) != os.pread(self._descriptor, CHECKSUM_NBYTES, start):
            raise ValueError(f"{self._name}: the checksum of row {place} is wrong")


class DirectStore(ZarrStore):
    """`ZarrStore` for local disks. Arrays that others have recompressed or rechunked go through zarr.

    `checksums` verifies every row that is read (zarr always does).
    """

    def __init__(self, storage: LocalStorage, spec: CacheSpec, checksums: bool = False) -> None:
        super().__init__(storage, spec)
        self.checksums = checksums
        self._open = lru_cache(OPEN_SHARDS)(partial(ShardFile, storage))

    def _read_array(self, teacher: str, name: str, shards: Ints, places: Ints, values: NDArray) -> None:
        if not self.is_plain(teacher, name, values):
            return super()._read_array(teacher, name, shards, places, values)
        for value, shard, place in zip(values, shards.tolist(), places.tolist(), strict=True):
            file = shard_file(teacher, name, shard, value.ndim)
            chunk = value.reshape(-1).view(np.uint8).data
            retrying(
                partial(self._read_row, file, self.spec.rows_per_shard, place, chunk),
                f"{self.storage.url}/{file}",
                again=self._open.cache_clear,  # a stale descriptor stays stale
            )

    def _read_row(self, file: str, num_rows: int, place: int, out: memoryview) -> None:
        self._open(file, num_rows, out.nbytes).read(place, out, self.checksums)


class RangeStore(ZarrStore):
    """`ZarrStore` for object stores; otherwise as `DirectStore`, with every row's checksum verified.

    A request takes tens of milliseconds and zarr makes two for each row, one after the other. Here a shard's
    index is fetched once and kept, and a read requests all its rows at once.
    """

    def _read_array(self, teacher: str, name: str, shards: Ints, places: Ints, values: NDArray) -> None:
        if not self.is_plain(teacher, name, values):
            return super()._read_array(teacher, name, shards, places, values)
        files = [shard_file(teacher, name, shard, values.ndim - 1) for shard in shards.tolist()]
        starts = self.chunk_starts(teacher, name, shards, places, values.ndim - 1)
        row_nbytes = values[:1].nbytes
        chunk_nbytes = [row_nbytes + CHECKSUM_NBYTES] * len(files)
        chunks = self.storage.read_ranges(files, starts.tolist(), chunk_nbytes)
        for value, file, place, data in zip(values, files, places.tolist(), chunks, strict=True):
            row, stored = memoryview(data)[:row_nbytes], data[row_nbytes:]
            if checksum(row) != stored:  # also where bytes are missing
                raise ValueError(f"{file}: the checksum of row {place} is wrong")
            value.reshape(-1).view(np.uint8)[:] = np.frombuffer(row, np.uint8)
