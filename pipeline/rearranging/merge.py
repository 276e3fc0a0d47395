"""Merge caches of disjoint samples into one."""

import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import CacheMismatchError
from teachercache.pipeline.rearranging.new_shards import whole_shards
from teachercache.pipeline.rearranging.rearrangement import Rearrangement, dataset_of, lay_out, with_samples
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
    offsets = accumulate((source.num_samples for source in sources), initial=0)
    shards = accumulate((source.spec.num_shards for source in sources), initial=0)
    parts = list(zip(sources, offsets, shards, strict=False))
    segments, views = [], []
    for source, offset, shard in parts:
        for segment in source.spec.segments:
            moved = {
                "first_row": segment.first_row + shard * first.rows_per_shard,
                "samples": (segment.samples[0] + offset, segment.samples[1] + offset),
                "fingerprint": segment.fingerprint or source.spec.dataset.fingerprint,
            }
            segments.append(segment.model_copy(update=moved))
        lines = source.manifest.views(source.spec)
        views.append(with_samples(lines, lines["sample_index"].to_numpy() + offset))
    # The listing of one part would make a later build skip the images of the others.
    dataset = dataset_of(sources, samples, location=location, listing=None)
    spec = first.changed(dataset=dataset, segments=tuple(segments))
    target = lay_out(out, spec, sources, samples, pa.concat_tables(views))
    steps = [step for source, offset, shard in parts for step in whole_shards(source, target, shard, offset)]
    return Rearrangement(target.storage.url, steps)


def _one_location(sources: Sequence[FeatureCache]) -> tuple[str, list[pa.Table]]:
    """The folder that contains all images, and the sample tables with paths relative to it.

    It follows from names alone: the images may be gone, where caches hold copies.
    """
    datasets, tables = [source.spec.dataset for source in sources], [source.samples for source in sources]
    locations = sorted({dataset.location for dataset in datasets})
    if len(locations) == 1:
        return locations[0], tables
    roots = [
        Place.root(dataset.location, table["path"].unique().to_pylist())
        for dataset, table in zip(datasets, tables, strict=True)
    ]
    remote = any("://" in root for root in roots)
    if (remote and len(set(roots)) > 1) or any(dataset.kind == KIND for dataset in datasets):
        raise CacheMismatchError(
            "The images of these caches are not below one place.",
            got=" and ".join(locations),
            expected="images below one folder, or in one bucket and prefix; or the very same several sources",
            do="build with patterns below one prefix, or one cache of all of these sources",
        )
    if remote:
        return roots[0], tables
    common = os.path.commonpath(roots)
    for number, (table, root) in enumerate(zip(tables, roots, strict=True)):
        prefix = PurePosixPath(Path(root).relative_to(common).as_posix())
        paths = [str(prefix / path) for path in table["path"].to_pylist()]
        place = table.schema.get_field_index("path")
        tables[number] = table.set_column(place, "path", pa.array(paths, pa.string()))
    return common, tables
