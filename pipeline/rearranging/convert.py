"""Copy a cache into the other kind of store."""

from functools import partial

import numpy as np

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import CacheError
from teachercache.pipeline.rearranging.packed_shards import write_rows
from teachercache.pipeline.rearranging.rearrangement import Rearrangement, Step, lay_out
from teachercache.pipeline.rearranging.whole_shards import (
    link_or_copy,
    missing,
    take_over_quarantine,
    whole_shards,
)
from teachercache.pipeline.records.manifest import moments_name
from teachercache.pipeline.records.spec import StoreKind


def convert(url: str, out: str, store: StoreKind) -> Rearrangement:
    """The same rows in the other kind of store, uncompressed, with the same ids and records.

    Raises `CacheMismatchError` where another cache is at `out`.
    """
    source = FeatureCache.open(url, checksums=True)
    if source.spec.store == store:
        raise CacheError(
            "There is nothing to convert.",
            got=f"{url}, a {store} cache",
            expected="a cache of the other kind",
            do="copy the folder if you want a copy",
        )
    spec = source.spec.changed(store=store, compressor=None)
    target = lay_out(out, spec, [source], source.samples, source.manifest.views(source.spec))

    def rewrite(teacher: str, shard: int) -> None:
        record = source.commits(teacher)[shard]
        rows = np.array(source.spec.shard_rows(shard), np.int64)
        files = write_rows(source, target, teacher, shard, rows, set(record.invalid_rows))
        statistics = moments_name(teacher, shard)
        if statistics in record.files:
            files[statistics] = record.files[statistics]
            link_or_copy(source.storage, statistics, files[statistics], target.storage, statistics)
        take_over_quarantine(source, target, shard, shard, 0)
        target.manifest.commit(record.model_copy(update={"files": files}))

    steps = [
        Step(name, shard, partial(rewrite, name, shard))
        for name, shard in missing(source, target)
        if name in source.spec.with_arrays
    ]
    copies = [step for step in whole_shards(source, target, 0) if step.teacher not in source.spec.with_arrays]
    return Rearrangement(target.storage.url, [*steps, *copies])
