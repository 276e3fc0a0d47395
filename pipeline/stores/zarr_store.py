"""Features in plain Zarr v3: one group per teacher, one chunk per row, one shard file per committed shard.

Files are written here and not through zarr-python, because a shard has to be streamed (one of SAM's is
gigabytes), fsynced, renamed and hashed as it is written. The format is that of the sharding codec
(`shard_format`, `zarr_metadata`); tests hold these bytes equal to what zarr-python writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from teachercache.pipeline.places.storage import Storage
from teachercache.pipeline.records.array_layout import ArrayLayout
from teachercache.pipeline.records.spec import CacheSpec
from teachercache.pipeline.stores.feature_store import Arrays, FeatureStore, ShardWriter, unreadable
from teachercache.pipeline.stores.shard_format import ABSENT, Index, checksum, empty_index, read_index
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
        self._layout = lru_cache(None)(self._read_layout)
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

    def _read_layout(self, teacher: str, name: str) -> tuple[ArrayLayout, bool]:
        file = f"{array_folder(teacher, name)}/zarr.json"
        return layout_of(file, self.storage.read(file), self.spec)

    def is_as_written(self, teacher: str) -> bool:
        return all(self._layout(teacher, name)[1] for name in self.stored_layouts(teacher))

    def is_plain(self, teacher: str, name: str, values: NDArray) -> bool:
        """Whether a chunk's bytes are a row's in memory, as `create` lays them out."""
        layout, as_written = self._layout(teacher, name)
        plain = as_written and self.spec.compressor is None
        return plain and (layout.dtype, layout.shape) == (values.dtype, values.shape[1:])
