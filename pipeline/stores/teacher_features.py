"""Rows of arrays; those of a teacher are its features, which know how they are decoded."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teachercache.pipeline.codecs import Codec, Encoded, get_codec, torch_dtype
from teachercache.pipeline.errors import ArgumentError, CacheError, IncompleteCacheError
from teachercache.pipeline.records.array_layout import ArrayLayout
from teachercache.pipeline.records.manifest import foreign_tables
from teachercache.pipeline.records.stats_files import read_tables
from teachercache.pipeline.stores.committed_shards import CommittedShards
from teachercache.pipeline.stores.feature_store import CLS_TOKEN, GLOBAL_FEATURE


class StoredRows:
    """Of a teacher, or the pixels of rendered images."""

    def __init__(self, shards: CommittedShards) -> None:
        self._shards, self._name = shards, shards.teacher

    @cached_property
    def layouts(self) -> dict[str, ArrayLayout]:
        """Every array: of a teacher, those of the encoded features, and the token features."""
        return self._shards.store.layouts(self._name)

    def read(
        self,
        rows: NDArray[np.int64],
        layouts: Mapping[str, ArrayLayout],
        out: Mapping[str, Tensor] | None,
    ) -> dict[str, Tensor]:
        """Arrays of `layouts` for `rows`, in the first rows of `out`. Raises as `FeatureCache.read`."""
        readable = self._shards.readable(rows)
        if not readable.all():
            self._refuse(rows, readable)
        if out is None:
            tensors = _tensors(layouts, len(rows), torch.empty)
        else:
            tensors = {
                name: _first_rows(out, name, (len(rows), *layout.shape), torch_dtype(layout.dtype))
                for name, layout in layouts.items()
            }
        self._shards.read(rows, {name: tensor.numpy() for name, tensor in tensors.items()})
        return tensors

    def _refuse(self, rows: NDArray[np.int64], readable: NDArray[np.bool_]) -> NoReturn:
        shards = rows // self._shards.store.spec.rows_per_shard
        committed = self._shards.mask[shards]
        if not committed.all():
            raise IncompleteCacheError(
                f"Some requested rows of teacher {self._name} are not committed.",
                got=f"shard {', '.join(map(str, np.unique(shards[~committed])[:10]))}",
                expected="rows of committed shards",
                do="run the same build command again; it computes only what is missing",
            )
        row = int(rows[~readable].min())
        raise CacheError(
            f"Row {row} is empty: its image could not be decoded.",
            got=f"sample {self._shards.store.key(int(self._shards.index.locate(row)[0]))}",
            expected="rows of `valid_samples()`",
            do=f"see {self._shards.store.storage.url}/quarantine for the reason",
        )


class StoredFeatures(StoredRows):
    @cached_property
    def codec(self) -> Codec:
        return self.load_codec()

    def load_codec(self) -> Codec:
        """The codec with newly read tables. Raises `CacheError` unless they can decode."""
        teacher = self._shards.store.spec.teachers[self._name]
        codec = get_codec(teacher.codec)
        if codec.needs_tables:
            tables = read_tables(self._shards.manifest, self._name, teacher.tables_hash)
            layouts = codec.layout(teacher.num_levels, teacher.stored_grid, teacher.width)
            try:
                codec.load_state(tables)  # sound tables can decode codes of zeros
                Encoded(codec, _tensors(layouts, 1, torch.zeros)).decode()
            except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
                got, expected = f"{type(error).__name__}: {error}", f"tables of codec {teacher.codec}"
                raise foreign_tables(self._name, got, expected) from error
        return codec

    @cached_property
    def feature_layouts(self) -> dict[str, ArrayLayout]:
        """The arrays of the encoded features alone."""
        tokens = (CLS_TOKEN, GLOBAL_FEATURE)
        return {array: layout for array, layout in self.layouts.items() if array not in tokens}

    def token_layout(self, name: str) -> ArrayLayout:
        """Of `cls` or `global`. Raises `CacheError` where the teacher does not store it."""
        if name not in self.layouts:
            raise CacheError(
                f"Teacher {self._name} of this cache has no stored {name} feature.",
                expected="a cache built with cls_token: true (or global_feature: true) for this teacher",
                do="build the teacher again under another name with that setting",
            )
        return self.layouts[name]

    def buffers(self, num_rows: int) -> Encoded:
        return Encoded(self.codec, _tensors(self.feature_layouts, num_rows, torch.empty))


def _tensors(
    layouts: Mapping[str, ArrayLayout], num_rows: int, make: Callable[..., Tensor]
) -> dict[str, Tensor]:
    return {
        name: make((num_rows, *layout.shape), dtype=torch_dtype(layout.dtype))
        for name, layout in layouts.items()
    }


def _first_rows(
    buffers: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """The part of a buffer that is filled. Raises `ValueError` where it does not fit."""
    buffer = buffers.get(name)
    if buffer is not None:
        buffer = buffer[: shape[0]]
        fits = (buffer.shape, buffer.dtype, buffer.device.type) == (shape, dtype, "cpu")
        if fits and buffer.is_contiguous():
            return buffer
    raise ArgumentError(
        f"The buffer for {name} does not fit.",
        got="none" if buffer is None else f"{buffer.dtype} {tuple(buffer.shape)} on {buffer.device}",
        expected=f"{dtype} {shape}, contiguous, on the CPU",
        do="make the buffers with cache.buffers(), for as many rows as you read at once",
    )
