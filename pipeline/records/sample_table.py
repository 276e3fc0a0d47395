"""The samples of a cache by number and by key, read on first use."""

import difflib
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from teachercache.pipeline.errors import UnknownKeyError
from teachercache.pipeline.records.manifest import Manifest
from teachercache.pipeline.records.spec import CacheSpec

_NEAR_KEYS = 5


class SampleTable:
    def __init__(self, manifest: Manifest, spec: CacheSpec) -> None:
        self._manifest, self._spec = manifest, spec

    @cached_property
    def table(self) -> pa.Table:
        """Raises as `Manifest.samples`."""
        return self._manifest.samples(self._spec)

    def key(self, sample_index: int) -> str:
        return self.table["key"][sample_index].as_py()


def find_key(keys: pa.ChunkedArray, key: str, *, whole: bool = False) -> int:
    """The index of `key`, or unless it is `whole` of the only key that ends in it: behind a slash, or else
    anywhere.

    Raises `UnknownKeyError` naming those that end so, or else the nearest.
    """
    index: int = pc.index(keys, key).as_py()
    if index >= 0:
        return index
    found = np.array([], np.int64)
    for end in () if whole else (f"/{key}", key):
        found = np.flatnonzero(pc.ends_with(keys, end).to_numpy())
        if len(found) == 1:
            return int(found[0])
        if found.size:
            break
    near = found if found.size else np.flatnonzero(pc.match_substring(keys, key).to_numpy())
    names = keys.take(near[:_NEAR_KEYS]).to_pylist() or difflib.get_close_matches(key, keys.to_pylist(), 3)
    raise UnknownKeyError(
        f"{len(found)} samples have keys that end so." if found.size else "No sample has this key.",
        got=key,
        expected=f"one of {', '.join(names)}, …" if names else "a key of samples.parquet, or the end of one",
        do="give the whole key",
    )
