"""The samples of a cache by number and by key, read on first use."""

from __future__ import annotations

import difflib
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc

from teachercache.pipeline.records.manifest import Manifest
from teachercache.pipeline.records.spec import CacheSpec


class SampleTable:
    def __init__(self, manifest: Manifest, spec: CacheSpec) -> None:
        self._manifest, self._spec = manifest, spec

    @cached_property
    def table(self) -> pa.Table:
        """Raises as `Manifest.samples`."""
        return self._manifest.samples(self._spec)

    def key(self, sample_index: int) -> str:
        return self.table["key"][sample_index].as_py()

    def find(self, key: str) -> int:
        """The index of the sample with this key. Raises `KeyError` naming the nearest keys."""
        index: int = pc.index(self.table["key"], key).as_py()
        if index < 0:
            near = difflib.get_close_matches(key, self.table["key"].to_pylist(), 3)
            raise KeyError(
                f"no sample {key!r} in this cache" + (f"; near: {', '.join(near)}" if near else "")
            )
        return index
