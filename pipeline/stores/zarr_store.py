"""Features in plain Zarr v3: one group a teacher, one chunk a row, one shard file a committed shard.

Shard files are written here and not through zarr-python, because a shard has to be streamed (one of
SAM's is gigabytes), fsynced, renamed and hashed as it is written. The format is that of the sharding
codec (`shard_format`); a test holds these bytes equal to what zarr-python writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, MemoryStore

from pipeline.codecs import ArrayLayout
from pipeline.errors import CorruptShardError
from pipeline.manifest import FileRecord
from pipeline.spec import CacheSpec
from pipeline.storage import ChecksumWriter, LocalStorage, Storage
from pipeline.stores.base import Arrays, FeatureStore, ShardWriter, teacher_layouts
from pipeline.stores.shard_format import ABSENT, Index, checksum, empty_index, index_nbytes, parse_index

_KEPT_INDEXES = 1024

Ints = NDArray[np.int64]


def array_folder(teacher: str, array: str) -> str:
    return f"teachers/{teacher}/{array}"


def shard_file(teacher: str, array: str, shard: int, row_ndim: int) -> str:
    """Zarr's default chunk key: the shard along the row axis, 0 along every other."""
    return f"{array_folder(teacher, array)}/c/{shard}{'/0' * row_ndim}"


def numpy_dtype(layout: ArrayLayout) -> np.dtype:
    return np.dtype(str(layout.dtype).removeprefix("torch.")).newbyteorder("<")


class ZarrShardWriter(ShardWriter):
    def __init__(
        self,
        names: dict[str, str],
        files: dict[str, ChecksumWriter],
        layouts: dict[str, ArrayLayout],
        rows: int,
    ) -> None:
        self._names, self._files, self._layouts = names, files, layouts
        self._index = {array: empty_index(rows) for array in files}

    def write(self, offsets: Sequence[int], arrays: Mapping[str, NDArray]) -> None:
        assert arrays.keys() == self._files.keys(), (arrays.keys(), self._files.keys())
        for array, values in arrays.items():
            file, layout = self._files[array], self._layouts[array]
            assert values.shape == (len(offsets), *layout.shape), (array, values.shape, layout.shape)
            data = np.ascontiguousarray(values, numpy_dtype(layout))
            for offset, chunk in zip(offsets, data, strict=True):
                start = file.nbytes
                _write_checked(file, chunk.tobytes())
                self._index[array][offset] = start, file.nbytes - start

    def finish(self) -> None:
        for array, index in self._index.items():
            _write_checked(self._files[array], index.tobytes())

    def files(self) -> dict[str, FileRecord]:
        return {
            self._names[array]: FileRecord(nbytes=file.nbytes, checksum=file.checksum)
            for array, file in self._files.items()
        }


def _write_checked(file: ChecksumWriter, data: bytes) -> None:
    file.write(data)
    file.write(checksum(data))


class ZarrStore(FeatureStore):
    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._arrays: dict[tuple[str, str], zarr.Array] = {}
        self._read_index = lru_cache(_KEPT_INDEXES)(partial(_read_index, storage))

    def create(self, spec: CacheSpec, teacher: str) -> None:
        memory = MemoryStore()
        description = spec.teachers[teacher].model_dump(mode="json")
        group = zarr.create_group(
            memory, attributes={"teacher": description, "content_id": spec.content_id(teacher)}
        )
        for name, layout in teacher_layouts(spec.teachers[teacher]).items():
            group.create_array(
                name,
                shape=(spec.num_shards * spec.rows_per_shard, *layout.shape),
                shards=(spec.rows_per_shard, *layout.shape),
                chunks=(1, *layout.shape),
                dtype=numpy_dtype(layout),
                filters=None,
                serializer=BytesCodec(),
                compressors=[Crc32cCodec()],
                fill_value=0,
                dimension_names=("row", *layout.axes),
                attributes=layout.attributes,
            )
        for key, value in _items(memory):
            self.storage.write(f"teachers/{teacher}/{key}", value)

    @contextmanager
    def write_shard(self, spec: CacheSpec, teacher: str, shard: int) -> Iterator[ZarrShardWriter]:
        layouts = teacher_layouts(spec.teachers[teacher])
        names = {
            array: shard_file(teacher, array, shard, len(layout.shape)) for array, layout in layouts.items()
        }
        with ExitStack() as stack:
            files = {
                array: stack.enter_context(self.storage.open_write(name)) for array, name in names.items()
            }
            writer = ZarrShardWriter(names, files, layouts, spec.rows_per_shard)
            yield writer
            writer.finish()

    def read(self, spec: CacheSpec, teacher: str, rows: NDArray[np.int64], out: Arrays) -> None:
        shards, places = np.divmod(rows, spec.rows_per_shard)
        for name, values in out.items():
            try:
                self._read_array(spec, teacher, name, shards, places, values)
            except (ValueError, FileNotFoundError, KeyError) as error:  # ValueError: also a wrong checksum
                raise CorruptShardError(
                    f"Array {name} of teacher {teacher} cannot be read.",
                    got=f"{type(error).__name__}: {error}",
                    expected="the bytes that the commit records state",
                    do=f"run: teachercache verify {self.storage.url}",
                ) from error

    def _read_array(
        self, spec: CacheSpec, teacher: str, name: str, shards: Ints, places: Ints, values: NDArray
    ) -> None:
        """Rows at `places` in `shards`. zarr would give zeros for files and rows that are not there."""
        for shard in np.unique(shards).tolist():
            file = shard_file(teacher, name, shard, values.ndim - 1)
            present = (self._read_index(file, spec.rows_per_shard) != ABSENT).all(1)[places[shards == shard]]
            if not present.all():
                raise ValueError(f"{file} holds no row {places[shards == shard][~present][0]}")
        array, as_buffer = self._array(teacher, name), default_buffer_prototype().nd_buffer.from_numpy_array
        rows = shards * spec.rows_per_shard + places
        for row, value in zip(rows.tolist(), values, strict=True):  # zarr gathers a list of rows by value
            array.get_basic_selection(slice(row, row + 1), out=as_buffer(value[None]))

    def _array(self, teacher: str, name: str) -> zarr.Array:
        if (teacher, name) not in self._arrays:
            array = zarr.open_array(self._zarr_store(), path=array_folder(teacher, name), mode="r")
            self._arrays[teacher, name] = array
        return self._arrays[teacher, name]

    def _zarr_store(self) -> Store:
        if isinstance(self.storage, LocalStorage):
            return LocalStore(self.storage.root, read_only=True)
        return FsspecStore.from_url(self.storage.url, read_only=True)


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
        found = [(key, await store.get(key, prototype)) async for key in store.list()]
        return [(key, buffer.to_bytes()) for key, buffer in found if buffer is not None]

    yield from sorted(sync(collect()))
