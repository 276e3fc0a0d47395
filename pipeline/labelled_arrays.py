"""A cache as labelled arrays, for those who think in xarray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache import FeatureCache

if TYPE_CHECKING:
    import xarray

_DIMENSIONS = ("sample", "view", "level", "height", "width", "channel")


def to_xarray(cache: FeatureCache, teachers: Sequence[str] | None = None) -> xarray.DataTree:
    """Decoded features, one group a teacher, read when they are used.

    tree = cache.to_xarray()
    tree["dinov2/features"].sel(sample="n01440764/n01440764_10026", view=0, level=24).values

    Float32, in the order sample, view, level, height, width, channel; samples are labelled by key, levels
    by block (1-based). Needs the package xarray. Reading raises as `FeatureCache.read` does.
    """
    import xarray
    from xarray.backends import BackendArray
    from xarray.core import indexing

    class Features(BackendArray):
        def __init__(self, teacher: str) -> None:
            spec = cache.spec.teachers[teacher]
            self.teacher, self.dtype = teacher, np.dtype(np.float32)
            self.shape = (cache.num_samples, num_views, spec.num_levels, *spec.stored_grid, spec.width)

        def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
            return indexing.explicit_indexing_adapter(
                key, self.shape, indexing.IndexingSupport.OUTER, self.read
            )

        def read(self, key: tuple[Any, ...]) -> NDArray:
            chosen = [np.arange(size)[index] for size, index in zip(self.shape, key, strict=True)]
            rows_SV = cache.index.rows(*np.ix_(*map(np.atleast_1d, chosen[:2])))
            features = cache.read(rows_SV.ravel(), [self.teacher])[self.teacher].decode().numpy()
            features = features.reshape(*rows_SV.shape, *self.shape[2:])
            block: NDArray = features[np.ix_(*map(np.arange, rows_SV.shape), *map(np.atleast_1d, chosen[2:]))]
            return block.reshape([size for index in chosen for size in index.shape])

    num_views = max(segment.views[1] for segment in cache.spec.segments)
    groups = {
        "/": xarray.Dataset(coords={"sample": cache.samples["key"].to_pylist(), "view": np.arange(num_views)})
    }
    for name in cache.check_teachers(teachers):
        spec = cache.spec.teachers[name]
        features = xarray.Variable(_DIMENSIONS, indexing.LazilyIndexedArray(Features(name)))
        groups[f"/{name}"] = xarray.Dataset(
            {"features": features},
            coords={"level": [index + 1 for index in spec.block_indices]},
            attrs={"model": spec.model, "codec": spec.codec, "pretrained": spec.pretrained},
        )
    return xarray.DataTree.from_dict(groups)
