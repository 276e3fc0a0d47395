"""Uncompressed shards on an object store: a read requests all its rows at once, one range each.

A request takes tens of milliseconds and zarr makes two for each row, one after the other. Here a shard's
index is fetched once and kept, and a batch takes about the time of one request.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from teachercache.pipeline.stores.shard_format import CHECKSUM_NBYTES, checksum
from teachercache.pipeline.stores.zarr_store import Ints, ZarrStore, shard_file


class RangeStore(ZarrStore):
    """`ZarrStore` for object stores. Arrays that others have recompressed or rechunked go through zarr.

    Every row's checksum is verified, as zarr does.
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
