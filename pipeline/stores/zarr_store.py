"""Features in plain Zarr v3: one group a teacher, one chunk a row, one shard file a committed shard.

Shard files are written here and not through zarr-python, because a shard has to be streamed (one of
SAM's is gigabytes), fsynced, renamed and hashed as it is written. The format is that of the sharding
codec: each chunk's bytes followed by their crc32c, then the index, a little-endian (offset, nbytes)
pair of uint64 per chunk, 2⁶⁴-1 for an absent chunk, followed by the index's own crc32c. A test holds
these bytes equal to what zarr-python writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import PurePosixPath

import google_crc32c
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

ABSENT = np.uint64(2**64 - 1)


def array_folder(teacher: str, array: str) -> str:
    return f"teachers/{teacher}/{array}"


def shard_file(teacher: str, array: str, shard: int, row_ndim: int) -> str:
    """Zarr's default chunk key: the shard along the row axis, 0 along every other."""
    return str(PurePosixPath(array_folder(teacher, array), "c", str(shard), *["0"] * row_ndim))


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
        self._index = {array: np.full((rows, 2), ABSENT, "<u8") for array in files}

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
    checksum: int = google_crc32c.value(data)
    file.write(checksum.to_bytes(4, "little"))


class ZarrStore(FeatureStore):
    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._arrays: dict[tuple[str, str], zarr.Array] = {}

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

    def read(self, spec: CacheSpec, teacher: str, rows: NDArray[np.int64], names: Sequence[str]) -> Arrays:
        return {name: self._read_array(teacher, name, rows) for name in names}

    def _read_array(self, teacher: str, name: str, rows: NDArray[np.int64]) -> NDArray:
        try:
            values = self._array(teacher, name).get_orthogonal_selection((rows,))
        except (ValueError, OSError, KeyError) as error:  # zarr raises ValueError on a checksum mismatch
            raise CorruptShardError(
                f"Array {name} of teacher {teacher} cannot be read.",
                got=f"{type(error).__name__}: {error}",
                expected="the bytes that the commit records state",
                do=f"run: teachercache verify {self.storage.url}",
            ) from error
        return np.asarray(values)

    def _array(self, teacher: str, name: str) -> zarr.Array:
        if (teacher, name) not in self._arrays:
            array = zarr.open_array(self._zarr_store(), path=array_folder(teacher, name), mode="r")
            self._arrays[teacher, name] = array
        return self._arrays[teacher, name]

    def _zarr_store(self) -> Store:
        if isinstance(self.storage, LocalStorage):
            return LocalStore(self.storage.root, read_only=True)
        return FsspecStore.from_url(self.storage.url, read_only=True)

    def __getstate__(self) -> dict[str, object]:
        return {"storage": self.storage, "_arrays": {}}


def _items(store: MemoryStore) -> Iterator[tuple[str, bytes]]:
    async def collect() -> list[tuple[str, bytes]]:
        prototype = default_buffer_prototype()
        found = [(key, await store.get(key, prototype)) async for key in store.list()]
        return [(key, buffer.to_bytes()) for key, buffer in found if buffer is not None]

    yield from sorted(sync(collect()))
