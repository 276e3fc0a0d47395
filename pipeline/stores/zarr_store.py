"""Features in plain Zarr v3: one group per teacher, one chunk per row, one shard file per committed shard.

Shard files are written here and not through zarr-python, because a shard has to be streamed (one of
SAM's is gigabytes), fsynced, renamed and hashed as it is written. The format is that of the sharding
codec (`shard_format`); a test compares the bytes with those that zarr-python writes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, MemoryStore

from teachercache.pipeline.codecs import ArrayLayout
from teachercache.pipeline.errors import StorageError
from teachercache.pipeline.places.files import ChecksumWriter
from teachercache.pipeline.places.local_storage import LocalStorage
from teachercache.pipeline.places.remote_storage import client_options
from teachercache.pipeline.places.retries import retrying
from teachercache.pipeline.places.storage import Storage
from teachercache.pipeline.records.spec import CacheSpec
from teachercache.pipeline.stores.feature_store import (
    Arrays,
    FeatureStore,
    ShardWriter,
    numpy_dtype,
    teacher_layouts,
    unreadable,
)
from teachercache.pipeline.stores.shard_format import (
    ABSENT,
    Index,
    checksum,
    empty_index,
    index_nbytes,
    parse_index,
)

_KEPT_INDEXES = 1024

Ints = NDArray[np.int64]


def array_folder(teacher: str, array: str) -> str:
    return f"teachers/{teacher}/{array}"


def shard_file(teacher: str, array: str, shard: int, row_ndim: int) -> str:
    """Zarr's default chunk key: the shard along the row axis, 0 along every other."""
    return f"{array_folder(teacher, array)}/c/{shard}{'/0' * row_ndim}"


class ZarrShardWriter(ShardWriter):
    """`layouts` by array; `names` of the arrays' files, in the same order."""

    def __init__(
        self, storage: Storage, names: Sequence[str], layouts: dict[str, ArrayLayout], rows: int
    ) -> None:
        super().__init__(storage, names)
        self._file_of = dict(zip(layouts, self._files.values(), strict=True))
        self._layouts = layouts
        self._index = {array: empty_index(rows) for array in layouts}

    def write(self, offsets: Sequence[int], arrays: Mapping[str, NDArray]) -> None:
        assert arrays.keys() == self._layouts.keys(), (arrays.keys(), self._layouts.keys())
        for array, values in arrays.items():
            file, layout = self._file_of[array], self._layouts[array]
            assert values.shape == (len(offsets), *layout.shape), (array, values.shape, layout.shape)
            data = np.ascontiguousarray(values, numpy_dtype(layout))
            for offset, chunk in zip(offsets, data, strict=True):
                start = file.nbytes
                _write_checked(file, chunk.tobytes())
                self._index[array][offset] = start, file.nbytes - start

    def _end(self) -> None:
        for array, index in self._index.items():
            file = self._file_of[array]
            file.write(bytes.fromhex(file.checksum))
            _write_checked(file, index.tobytes())


def _write_checked(file: ChecksumWriter, data: bytes) -> None:
    file.write(data)
    file.write(checksum(data))


class ZarrStore(FeatureStore):
    def __init__(self, storage: Storage, spec: CacheSpec) -> None:
        super().__init__(storage, spec)
        self._arrays: dict[tuple[str, str], zarr.Array] = {}
        self._plain: dict[tuple[str, str], bool] = {}
        self._read_index = lru_cache(_KEPT_INDEXES)(partial(_read_index, storage))

    def layout_files(self, teacher: str) -> dict[str, bytes]:
        memory = MemoryStore()
        description = self.spec.teachers[teacher].model_dump(mode="json")
        group = zarr.create_group(
            memory, attributes={"teacher": description, "content_id": self.spec.shard_content_id(teacher, 0)}
        )
        for name, layout in teacher_layouts(self.spec.teachers[teacher]).items():
            group.create_array(
                name,
                shape=(self.spec.num_shards * self.spec.rows_per_shard, *layout.shape),
                shards=(self.spec.rows_per_shard, *layout.shape),
                chunks=(1, *layout.shape),
                dtype=numpy_dtype(layout),
                filters=None,
                serializer=BytesCodec(),
                compressors=[Crc32cCodec()],
                fill_value=0,
                dimension_names=("row", *layout.axes),
                attributes=layout.attributes,
            )
        return {f"teachers/{teacher}/{key}": value for key, value in _items(memory)}

    def shard_files(self, teacher: str, shard: int) -> list[str]:
        layouts = teacher_layouts(self.spec.teachers[teacher])
        return [shard_file(teacher, array, shard, len(layout.shape)) for array, layout in layouts.items()]

    def write_shard(self, teacher: str, shard: int) -> ZarrShardWriter:
        layouts, names = teacher_layouts(self.spec.teachers[teacher]), self.shard_files(teacher, shard)
        return ZarrShardWriter(self.storage, names, layouts, self.spec.rows_per_shard)

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
        array, as_buffer = self._array(teacher, name), default_buffer_prototype().nd_buffer.from_numpy_array
        whole = array.chunks if array.shards is None else array.shards  # what zarr allocates
        shape = values.shape[1:]
        if array.shape[1:] != shape or math.prod(whole) > self.spec.rows_per_shard * math.prod(shape):
            raise ValueError(f"{name} is an array of {array.shape} in pieces of {whole}")
        rows = shards * self.spec.rows_per_shard + places
        with _as_value_errors(f"{array_folder(teacher, name)}"):

            def read(number: int) -> None:  # one row after another: zarr gathers a list of rows by value
                row = int(rows[number])
                rows_of = partial(array.get_basic_selection, out=as_buffer(values[number : number + 1]))
                retrying(
                    partial(rows_of, slice(row, row + 1)),
                    f"{self.storage.url}/{array_folder(teacher, name)}",
                )

            self.storage.each(read, range(len(rows)))

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

    def is_as_written(self, teacher: str) -> bool:
        try:
            return all(
                self.is_plain(teacher, name, np.empty((0, *layout.shape), numpy_dtype(layout)))
                for name, layout in teacher_layouts(self.spec.teachers[teacher]).items()
            )
        except (ValueError, FileNotFoundError) as error:
            raise unreadable(self.storage, teacher, error) from error

    def is_plain(self, teacher: str, name: str, values: NDArray) -> bool:
        """Whether a chunk's bytes are those of a row in memory, as `create` lays them out."""
        if (teacher, name) not in self._plain:
            self._plain[teacher, name] = self._is_plain(self._array(teacher, name), values)
        return self._plain[teacher, name]

    def _is_plain(self, array: zarr.Array, values: NDArray) -> bool:
        row_shape = values.shape[1:]
        return (
            array.dtype == values.dtype
            and array.chunks == (1, *row_shape)
            and array.shards == (self.spec.rows_per_shard, *row_shape)
            and (array.filters, array.compressors) == ((), (Crc32cCodec(),))
            and array.serializer in (BytesCodec(endian=None), BytesCodec(endian=sys.byteorder))
        )

    def _array(self, teacher: str, name: str) -> zarr.Array:
        if (teacher, name) not in self._arrays:
            folder = array_folder(teacher, name)
            if not self.storage.exists(f"{folder}/zarr.json"):  # zarr would read a device forever
                raise FileNotFoundError(f"{folder}/zarr.json")
            with _as_value_errors(f"{folder}/zarr.json"):
                self._arrays[teacher, name] = retrying(
                    lambda: zarr.open_array(self._zarr_store(), path=folder, mode="r"),
                    f"{self.storage.url}/{folder}/zarr.json",
                )
        return self._arrays[teacher, name]

    def _zarr_store(self) -> Store:
        if isinstance(self.storage, LocalStorage):
            return LocalStore(self.storage.root, read_only=True)
        options = client_options(self.storage.url)
        return FsspecStore.from_url(self.storage.url, storage_options=options, read_only=True)


@contextmanager
def _as_value_errors(what: str) -> Iterator[None]:
    """Damaged or hostile files make zarr raise errors of every kind."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        raise ValueError(f"{what}: {type(error).__name__}: {error}") from error


def _read_index(storage: Storage, name: str, num_rows: int) -> Index:
    file_nbytes = storage.size(name)
    if file_nbytes is None:
        raise FileNotFoundError(name)
    start = max(0, file_nbytes - index_nbytes(num_rows))
    end = storage.read_range(name, start, file_nbytes - start)
    try:
        return parse_index(end, num_rows, file_nbytes)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _items(store: MemoryStore) -> Iterator[tuple[str, bytes]]:
    async def collect() -> list[tuple[str, bytes]]:
        prototype = default_buffer_prototype()
        buffers = [(key, await store.get(key, prototype)) async for key in store.list()]
        return [(key, buffer.to_bytes()) for key, buffer in buffers if buffer is not None]

    yield from sorted(sync(collect()))
