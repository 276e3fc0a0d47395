"""Uncompressed shards on an object store: all rows of a read are asked for at once, one range each.

A request takes tens of milliseconds and zarr makes two for each row, one after the other. Here a shard's
index is fetched once and kept, and what a batch costs is about one request's time.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from pipeline.spec import CacheSpec
from pipeline.storage import Storage
from pipeline.stores.shard_format import CHECKSUM_NBYTES, checksum
from pipeline.stores.zarr_store import Ints, ZarrStore, shard_file

_THREADS = 16


class RangeStore(ZarrStore):
    """`ZarrStore` for object stores. Arrays that others have compressed or chunked anew go through zarr.

    Every row's checksum is verified, as zarr does.
    """

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="index")  # none until the first read

    def _read_array(
        self, spec: CacheSpec, teacher: str, name: str, shards: Ints, places: Ints, values: NDArray
    ) -> None:
        if not self.is_plain(spec, teacher, name, values):
            return super()._read_array(spec, teacher, name, shards, places, values)
        files = [shard_file(teacher, name, shard, values.ndim - 1) for shard in shards.tolist()]
        distinct = sorted(set(files))  # indexes that are not kept yet come side by side
        list(self._threads.map(lambda file: self._read_index(file, spec.rows_per_shard), distinct))
        starts = self.chunk_starts(spec, teacher, name, shards, places, values.ndim - 1)
        row_nbytes = values[:1].nbytes
        found = self.storage.read_ranges(files, starts.tolist(), row_nbytes + CHECKSUM_NBYTES)
        for value, file, place, data in zip(values, files, places.tolist(), found, strict=True):
            row, stored = memoryview(data)[:row_nbytes], data[row_nbytes:]
            if checksum(row) != stored:  # also where bytes are missing
                raise ValueError(f"{file}: the checksum of row {place} is wrong")
            value.reshape(-1).view(np.uint8)[:] = np.frombuffer(row, np.uint8)
