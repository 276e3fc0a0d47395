"""A cache as labelled arrays, for those who think in xarray. Needs the extra `view`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from teachercache.pipeline.errors import extra
from teachercache.pipeline.records.manifest import SPEC_NAME
from teachercache.pipeline.records.rows import RowIndex

with extra("view"):
    import xarray
    from xarray.backends import BackendArray
    from xarray.backends.zarr import ZarrBackendEntrypoint
    from xarray.core import indexing

if TYPE_CHECKING:
    from teachercache import FeatureCache

_DIMENSIONS = ("sample", "view", "level", "height", "width", "channel")


class CacheEntrypoint(ZarrBackendEntrypoint):
    """xarray's own for Zarr, which knows folders by the suffix `.zarr` alone."""

    description = "Open caches of teachercache"

    def guess_can_open(self, filename_or_obj: Any) -> bool:
        names = (SPEC_NAME, "zarr.json")
        is_path = isinstance(filename_or_obj, str | os.PathLike)
        return is_path and all((Path(filename_or_obj) / name).is_file() for name in names)


def to_xarray(cache: FeatureCache, teachers: Sequence[str] | None = None) -> xarray.DataTree:
    """Decoded features, one group per teacher, read on use.

    tree = cache.to_xarray()
    tree["dinov2/features"].sel(sample="n01440764/n01440764_10026", view=0, level=4).values

    `features` is float32, in the order sample, view, level, height, width, channel: what `cache[key]` gives.
    `attrs["grid"]` is the kind of grid that they are stored on. `valid` (sample, view) says which rows the
    teacher holds; all others are NaN: rows of quarantined samples, and of shards that are not committed or
    whose commit record is damaged. Samples are labelled by key and levels from 1; the coordinate `block`
    counts from 0, as `block_indices` does.
    Reading raises `CorruptShardError` for damaged features.
    """
    views = np.arange(max(segment.views[1] for segment in cache.spec.segments))
    groups = {"/": xarray.Dataset(coords={"sample": cache.samples["key"].to_pylist(), "view": views})}
    groups |= {f"/{name}": _group(cache, name, len(views)) for name in cache.check_teachers(teachers)}
    return xarray.DataTree.from_dict(groups)


def _group(cache: FeatureCache, name: str, num_views: int) -> xarray.Dataset:
    spec, valid = cache.spec.teachers[name], cache.shards[name].readable_rows
    row_shape = (spec.num_levels, *spec.stored_grid, spec.width)

    def features(rows: NDArray[np.int64]) -> NDArray:
        held = valid(rows)
        maps = np.full((rows.size, *row_shape), np.nan, np.float32)
        if held.any():
            maps[held] = cache.feature_maps(name, rows[held]).numpy()
        return maps

    def lazy(read: Callable[..., NDArray], dtype: DTypeLike, *row_shape: int) -> xarray.Variable:
        shape = cache.num_samples, num_views, *row_shape
        rows = indexing.LazilyIndexedArray(_Rows(cache.index, read, shape, np.dtype(dtype)))
        return xarray.Variable(_DIMENSIONS[: len(shape)], rows)

    return xarray.Dataset(
        {"features": lazy(features, np.float32, *row_shape), "valid": lazy(valid, np.bool_)},
        coords={"level": np.arange(1, spec.num_levels + 1), "block": ("level", [*spec.block_indices])},
        attrs=spec.model_dump(include={"model", "codec", "pretrained"}) | {"grid": spec.grid.kind},
    )


@dataclass(eq=False)
class _Rows(BackendArray):
    """(samples, views, …), of which `read` returns (rows, …) for any row numbers."""

    index: RowIndex
    read: Callable[[NDArray[np.int64]], NDArray]
    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.OUTER, self._chosen
        )

    def _chosen(self, key: tuple[Any, ...]) -> NDArray:
        chosen = [np.arange(size)[index] for size, index in zip(self.shape, key, strict=True)]
        rows_SV = self.index.rows(*np.ix_(*map(np.atleast_1d, chosen[:2])))
        values = self.read(rows_SV.ravel()).reshape(*rows_SV.shape, *self.shape[2:])
        block: NDArray = values[np.ix_(*map(np.arange, rows_SV.shape), *map(np.atleast_1d, chosen[2:]))]
        return block.reshape([size for index in chosen for size in index.shape])
