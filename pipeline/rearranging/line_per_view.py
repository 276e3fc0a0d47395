"""Export a line for each view, to Parquet or Lance; docs/cache_format.md has the columns."""

import posixpath
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from torch import Tensor

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import extra
from teachercache.pipeline.grids import mean_token
from teachercache.pipeline.places.open_storage import open_storage
from teachercache.pipeline.rearranging.theia import require_level
from teachercache.pipeline.stores.feature_store import CLS_TOKEN

_ROWS_AT_ONCE = 256


def export_lines(cache: FeatureCache, out: str, form: Literal["parquet", "lance"], level: int = -1) -> int:
    """Write all lines, or nothing; returns their number. Raises `MissingExtraError` without pylance, and
    `CacheError` for a level that is not stored."""
    require_level(cache, level)
    rows = cache.index.rows(cache.valid_samples()[:, None], np.arange(cache.num_views)).ravel()
    parts = (_lines(cache, rows[at : at + _ROWS_AT_ONCE], level) for at in range(0, len(rows), _ROWS_AT_ONCE))
    schema = _lines(cache, rows[:1], level).schema
    if form == "parquet":
        folder, name = posixpath.split(out)
        file = open_storage(folder or ".").open_write(name)
        with file as opened, pq.ParquetWriter(opened, schema) as writer:
            for part in parts:
                writer.write_batch(part)
        return len(rows)
    with extra("lance"):
        import lance
    lance.write_dataset(parts, out, schema=schema)
    return len(rows)


def _lines(cache: FeatureCache, rows: NDArray[np.int64], level: int) -> pa.RecordBatch:
    samples, views, _ = cache.index.locate(rows)
    key, label = (cache.samples[name].take(samples).combine_chunks() for name in ("key", "label"))
    columns = {"key": key, "view": pa.array(views, pa.int32()), "row": pa.array(rows), "label": label}
    for name, encoded in cache.read(rows).items():
        spec = cache.spec.teachers[name]
        columns[f"mean_{name}"] = _vectors(mean_token(encoded.decode()[:, level].flatten(1, 2), spec))
        if spec.cls_token:
            columns[f"cls_{name}"] = _vectors(cache.read_tokens(rows, name, CLS_TOKEN)[:, level])
    return pa.RecordBatch.from_pydict(columns)


def _vectors(values_BC: Tensor) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(values_BC.float().numpy().ravel(), values_BC.shape[1])
