"""A cache as labelled arrays, for those who think in xarray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from teachercache.pipeline.errors import extra

if TYPE_CHECKING:
    import xarray

    from teachercache import FeatureCache

_DIMENSIONS = ("sample", "view", "level", "height", "width", "channel")


def to_xarray(cache: FeatureCache, teachers: Sequence[str] | None = None) -> xarray.DataTree:
    """Decoded features, one group per teacher, read on use.

    tree = cache.to_xarray()
    tree["dinov2/features"].sel(sample="n01440764/n01440764_10026", view=0, level=4).values

    `features` is float32, in the order sample, view, level, height, width, channel: what `cache[key]` gives.
    `attrs["grid"]` is the kind of grid that they are stored on. `valid` (sample, view) says which rows the
    teacher holds; all others are NaN: rows of quarantined samples, and of shards that are not committed or
    whose commit record is damaged. Samples are labelled by key and levels from 1; the coordinate `block`
    counts from 0, as `block_indices` does. Needs the extra `view`.
    Reading raises `CorruptShardError` for damaged features.
    """
    with extra("view"):
        import xarray
        from xarray.backends import BackendArray
        from xarray.core import indexing

    class Lazy(BackendArray):
        """`read` returns values (rows, …) for any row numbers."""

        def __init__(
            self,
            read: Callable[[NDArray[np.int64]], NDArray],
            row_shape: tuple[int, ...],
            dtype: DTypeLike,
        ) -> None:
            self.read, self.dtype = read, np.dtype(dtype)
            self.shape = (cache.num_samples, num_views, *row_shape)

        def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
            return indexing.explicit_indexing_adapter(
                key, self.shape, indexing.IndexingSupport.OUTER, self.chosen
            )

        def chosen(self, key: tuple[Any, ...]) -> NDArray:
            chosen = [np.arange(size)[index] for size, index in zip(self.shape, key, strict=True)]
            rows_SV = cache.index.rows(*np.ix_(*map(np.atleast_1d, chosen[:2])))
            values = self.read(rows_SV.ravel()).reshape(*rows_SV.shape, *self.shape[2:])
            block: NDArray = values[np.ix_(*map(np.arange, rows_SV.shape), *map(np.atleast_1d, chosen[2:]))]
            return block.reshape([size for index in chosen for size in index.shape])

    def lazy(dimensions: tuple[str, ...], array: Lazy) -> xarray.Variable:
        return xarray.Variable(dimensions, indexing.LazilyIndexedArray(array))

    def group(name: str) -> xarray.Dataset:
        spec = cache.spec.teachers[name]
        row_shape = (spec.num_levels, *spec.stored_grid, spec.width)

        def valid(rows: NDArray[np.int64]) -> NDArray:
            return cache.shards[name].readable_rows(rows)

        def features(rows: NDArray[np.int64]) -> NDArray:
            held = valid(rows)
            maps = np.full((rows.size, *row_shape), np.nan, np.float32)
            if held.any():
                maps[held] = cache.feature_maps(name, rows[held]).numpy()
            return maps

        return xarray.Dataset(
            {
                "features": lazy(_DIMENSIONS, Lazy(features, row_shape, np.float32)),
                "valid": lazy(_DIMENSIONS[:2], Lazy(valid, (), np.bool_)),
            },
            coords={"level": np.arange(1, spec.num_levels + 1), "block": ("level", [*spec.block_indices])},
            attrs=spec.model_dump(include={"model", "codec", "pretrained"}) | {"grid": spec.grid.kind},
        )

    num_views = max(segment.views[1] for segment in cache.spec.segments)
    groups = {
        "/": xarray.Dataset(coords={"sample": cache.samples["key"].to_pylist(), "view": np.arange(num_views)})
    }
    groups |= {f"/{name}": group(name) for name in cache.check_teachers(teachers)}
    return xarray.DataTree.from_dict(groups)
