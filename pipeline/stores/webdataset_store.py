"""Features in tars that plain `webdataset` reads: one safetensors per row, one tar per committed shard.

docs/cache_format.md has the files. With the index (`tar_index`), reading a row takes one read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial

import google_crc32c
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from pydantic_core import from_json
from safetensors import SafetensorError

from teachercache.pipeline.places.storage import Storage
from teachercache.pipeline.records.array_layout import ArrayLayout, stored_layout
from teachercache.pipeline.records.rows import RowIndex
from teachercache.pipeline.records.spec import CacheSpec
from teachercache.pipeline.stores import tar_index
from teachercache.pipeline.stores.feature_store import Arrays, FeatureStore, ShardWriter, unreadable

_KEPT_INDEXES = 1024


class TarShardWriter(ShardWriter):
    def __init__(self, store: WebDatasetStore, teacher: str, shard: int) -> None:
        samples, views, _ = RowIndex(store.spec.segments).locate(store.spec.shard_rows(shard))
        self._members = [
            f"{tar_index.member_key(store.key(sample))}.{view}.safetensors"
            for sample, view in zip(samples.tolist(), views.tolist(), strict=True)
        ]
        super().__init__(store, teacher, shard)
        (self._file,) = self._files.values()
        self._index = np.zeros((store.spec.rows_per_shard, tar_index.COLUMNS), "<u8")

    def write(self, offsets: Sequence[int], arrays: Mapping[str, NDArray]) -> None:
        assert arrays.keys() == self._layouts.keys(), (arrays.keys(), self._layouts.keys())
        data = {
            name: np.ascontiguousarray(arrays[name], layout.dtype) for name, layout in self._layouts.items()
        }
        for place, offset in enumerate(offsets):
            row = safetensors.numpy.save({name: values[place] for name, values in data.items()})
            start = tar_index.add_member(self._file, self._members[offset], row)
            self._index[offset] = start, len(row), google_crc32c.value(row)

    def _end(self) -> None:
        tar_index.add_member(self._file, tar_index.INDEX_NAME, tar_index.index_bytes(self._index))
        self._file.write(tar_index.TAR_END)


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
        self._read_index = lru_cache(_KEPT_INDEXES)(partial(tar_index.read_tar_index, storage))

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
        return [tar_index.tar_name(teacher, shard)]

    def write_shard(self, teacher: str, shard: int) -> TarShardWriter:
        return TarShardWriter(self, teacher, shard)

    def read(self, teacher: str, rows: NDArray[np.int64], out: Arrays) -> None:
        try:
            shards, places = np.divmod(rows, self.spec.rows_per_shard)
            distinct, which = np.unique(shards, return_inverse=True)
            names = [tar_index.tar_name(teacher, shard) for shard in distinct.tolist()]
            indexes = self.storage.each(lambda name: self._read_index(name, self.spec.rows_per_shard), names)
            files = tar_index.read_rows(
                self.storage, [names[i] for i in which], [indexes[i] for i in which], places.tolist()
            )
            load_rows(files, out)
        except (ValueError, KeyError, FileNotFoundError, SafetensorError) as error:
            raise unreadable(self.storage, teacher, error) from error
