"""Uncompressed shards, read without zarr: from a local disk into the caller's memory, or by ranges.

A row on a disk takes one `pread` at the offset in the shard's index. That is as fast as copying from a mapped
file, and a file that is truncated while open gives an error instead of a SIGBUS. A shard's index is checked
once, when the shard is opened; the rows' own checksums only on request.
"""

import os
import weakref
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from teachercache.pipeline.places.local_storage import LocalStorage
from teachercache.pipeline.places.retries import retrying
from teachercache.pipeline.records.spec import CacheSpec
from teachercache.pipeline.stores.shard_format import (
    ABSENT,
    CHECKSUM_NBYTES,
    checksum,
    index_nbytes,
    parse_index,
)
from teachercache.pipeline.stores.zarr_store import Ints, ZarrStore, shard_file

OPEN_SHARDS = 256  # file descriptors; a shuffling window of 16 shards of three teachers needs about 150


class ShardFile:
    """An open shard whose chunks are `row_nbytes` long. Threads and forked processes may share it: reads
    state their offset, so they share no file position.

    Its file is closed when the last reference is gone, so a shard that drops out of the set of open ones
    during a read stays open until the read ends.
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
