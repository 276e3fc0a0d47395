"""Merge caches of disjoint samples into one."""

import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import CacheMismatchError
from teachercache.pipeline.rearranging.rearrangement import (
    Rearrangement,
    Step,
    labels_hash_of,
    lay_out,
    with_samples,
)
from teachercache.pipeline.rearranging.whole_shards import whole_shards
from teachercache.pipeline.records.tables import dataset_fingerprint
from teachercache.pipeline.sources.place import Place
from teachercache.pipeline.sources.several import KIND


def merge(urls: Sequence[str], out: str) -> Rearrangement:
    """Merge caches of disjoint samples and equal specs into one, in the order of `urls`.

    Rows keep their order within each cache; those of the first keep their numbers. Raises
    `CacheMismatchError` with every reason why the caches cannot be merged.
    """
    sources = [FeatureCache.open(url) for url in urls]
    first = sources[0].spec
    differences = [
        f"{source.storage.url}: {what}: the first cache has {one!r}, this one {other!r}"
        for source in sources[1:]
        for what, (one, other) in first.differences(source.spec).items()
    ]
    keys = pa.chunked_array([chunk for source in sources for chunk in source.samples["key"].chunks])
    counts = pc.value_counts(keys)
    shared = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    if len(shared):
        examples = ", ".join(shared.slice(0, 3).to_pylist())
        differences.append(f"{len(shared):,} samples are in more than one of them: {examples}")
    if len(sources) < 2:
        differences.append("there is only one cache")
    if differences:
        raise CacheMismatchError(
            "These caches cannot be merged:\n  - " + "\n  - ".join(differences),
            expected="caches of disjoint samples with the same views, shards, images and teachers",
            do="build the caches that differ again with one recipe, and with tables_from=FIRST if its codec "
            "learns tables; or take disjoint parts with `teachercache subset`",
        )
    location, tables = _one_location(sources)
    samples = pa.concat_tables(tables)
    offsets = [0, *accumulate(source.num_samples for source in sources)]
    shards = [0, *accumulate(source.spec.num_shards for source in sources)]
    segments, views = [], []
    for source, offset, shard in zip(sources, offsets, shards, strict=False):
        for segment in source.spec.segments:
            moved = {
                "first_row": segment.first_row + shard * first.rows_per_shard,
                "samples": (segment.samples[0] + offset, segment.samples[1] + offset),
                "fingerprint": segment.fingerprint or source.spec.dataset.fingerprint,
            }
            segments.append(segment.model_copy(update=moved))
        lines = source.manifest.views(source.spec)
        views.append(with_samples(lines, lines["sample_index"].to_numpy() + offset))
    dataset = first.dataset.model_copy(
        update={
            "location": location,
            "listing": None,  # the listing of one part would make a later build skip the images of the others
            "num_samples": samples.num_rows,
            "fingerprint": dataset_fingerprint(samples),
            "labels_hash": labels_hash_of(sources, samples),
        }
    )
    spec = first.changed(dataset=dataset, segments=tuple(segments))
    target = lay_out(out, spec, sources, samples, pa.concat_tables(views))
    steps: list[Step] = []
    for source, offset, shard in zip(sources, offsets, shards, strict=False):
        steps += whole_shards(source, target, shard, offset)
    return Rearrangement(target.storage.url, steps)


def _one_location(sources: Sequence[FeatureCache]) -> tuple[str, list[pa.Table]]:
    """The folder that contains all images, and the sample tables with paths relative to it.

    It follows from names alone: the images may be gone, where caches hold copies.
    """
    locations = [source.spec.dataset.location for source in sources]
    if len(set(locations)) == 1:
        return locations[0], [source.samples for source in sources]
    if any(source.spec.dataset.kind == KIND for source in sources):
        raise CacheMismatchError(
            "A cache of several sources merges with caches of the very same sources alone.",
            got=" and ".join(sorted(set(locations))),
            expected="one place of the images",
            do="build one cache of all of these sources",
        )
    roots = [
        Place.root(source.spec.dataset.location, source.samples["path"].unique().to_pylist())
        for source in sources
    ]
    if any("://" in root for root in roots):
        if len(set(roots)) > 1:
            raise CacheMismatchError(
                "The images of these caches are not below one URL.",
                got=", ".join(roots),
                expected="images of one bucket and prefix",
                do="build with patterns below one prefix",
            )
        return roots[0], [source.samples for source in sources]
    common = os.path.commonpath(roots)
    tables = []
    for source, root in zip(sources, roots, strict=True):
        prefix = PurePosixPath(Path(root).relative_to(common).as_posix())
        paths = [str(prefix / path) for path in source.samples["path"].to_pylist()]
        place = source.samples.schema.get_field_index("path")
        tables.append(source.samples.set_column(place, "path", pa.array(paths, pa.string())))
    return common, tables
