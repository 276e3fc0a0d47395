"""A new cache made of others: laid out, and filled step by step."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import AlreadyCommittedError, CacheMismatchError
from teachercache.pipeline.places.open_storage import open_storage
from teachercache.pipeline.places.storage import room_at, whole_or_nothing
from teachercache.pipeline.records.manifest import SAMPLES_NAME, SPEC_NAME, VIEWS_NAME, Manifest, tables_name
from teachercache.pipeline.records.spec import IMAGES, CacheSpec, DatasetSpec
from teachercache.pipeline.records.tables import dataset_fingerprint, labels_hash


@dataclass(frozen=True)
class Step:
    """Makes one shard of one teacher (or of "images"), numbered as in the new cache."""

    teacher: str
    shard: int
    make: Callable[[], None]


@dataclass(frozen=True)
class Rearrangement:
    """A new cache that is laid out, and the steps that still have to fill it."""

    url: str
    steps: list[Step]

    def run(self, progress: Callable[[], None] = lambda: None) -> FeatureCache:
        """Fill the cache; `progress` is called after each step.

        Shards that a build or the same command has committed there in the meantime stay. Raises
        `DiskSpaceError` when no more files can be written there.
        """
        storage = open_storage(self.url)
        storage.sweep()
        with room_at(self.url):
            for step in self.steps:
                with (
                    suppress(AlreadyCommittedError),
                    Manifest(storage).publishing(step.shard, [step.teacher]),
                ):
                    step.make()
                progress()
        storage.sweep()  # remove files of processes that died
        return FeatureCache.open(self.url)


def lay_out(
    out: str,
    spec: CacheSpec,
    sources: Sequence[FeatureCache],
    samples: pa.Table,
    views: pa.Table,
    codec_tables: Mapping[str, bytes] = MappingProxyType({}),
) -> FeatureCache:
    """The new cache, empty or as complete as an earlier run left it.

    `codec_tables` of teachers by name, where they are not those of the first source.
    """
    storage = open_storage(out)
    with room_at(storage.url), storage.exclusive(SPEC_NAME):
        manifest = Manifest(storage)
        if manifest.exists():
            existing = manifest.spec()
            if (existing.cache_id, existing.store) != (spec.cache_id, spec.store):
                raise CacheMismatchError(
                    "Another cache is at this path.",
                    got=f"{storage.url}: {existing.store}, cache_id {existing.cache_id}",
                    expected=f"nothing, or the beginning of this very cache: {spec.store}, {spec.cache_id}",
                    do="choose another place (-o …)",
                )
            return FeatureCache(storage, existing)
        target = FeatureCache(storage, spec)
        for name in (*spec.teachers, IMAGES):
            if left := manifest.committed_shards(name):
                raise CacheMismatchError(
                    "Shards of another cache are at this path.",
                    got=f"{len(left)} commit records of {name} in {storage.url}, without {SPEC_NAME}",
                    expected="nothing, or the beginning of this very cache",
                    do="choose another place (-o …)",
                )
        layouts = [file for name in (*spec.with_arrays, None) for file in target.store.layout_files(name)]
        new = [SPEC_NAME, SAMPLES_NAME, VIEWS_NAME, *map(tables_name, spec.teachers), *layouts]
        with whole_or_nothing(storage, new):
            for name in spec.teachers:
                tables = tables_name(name)
                if sources[0].storage.exists(tables):
                    storage.write(tables, codec_tables.get(name) or sources[0].storage.read(tables))
            for layout in (*spec.with_arrays, None):
                target.store.create(layout)
            manifest.create(spec, samples.slice(0, spec.dataset.num_samples), views.slice(0, spec.num_rows))
        return target


def dataset_of(sources: Sequence[FeatureCache], samples: pa.Table, **changes: str | None) -> DatasetSpec:
    """The first source's data set, of these samples: with a hash of labels where all sources have one."""
    stated = all(source.spec.dataset.labels_hash for source in sources)
    update = {
        "num_samples": samples.num_rows,
        "fingerprint": dataset_fingerprint(samples),
        "labels_hash": labels_hash(samples) if stated else None,
    }
    return sources[0].spec.dataset.model_copy(update=update | changes)


def with_samples(views: pa.Table, samples: NDArray[np.integer]) -> pa.Table:
    column = pa.array(samples.astype(np.int64))
    return views.set_column(0, views.schema.field("sample_index"), column)
