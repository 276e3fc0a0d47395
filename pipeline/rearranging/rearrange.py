"""New caches from caches, without a teacher and without decoding: `merge`, `subset`, `convert`.

Shards that stay whole are hard-linked where both caches are in one file system, and copied, with their
checksums compared, where they are not; nothing in a cache is ever written in place, so links do no harm. All
three go on where they were stopped: what the new cache has committed stays.
"""

from __future__ import annotations

import difflib
import math
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import accumulate
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import (
    AlreadyCommittedError,
    CacheError,
    CacheMismatchError,
    CorruptShardError,
)
from teachercache.pipeline.loading.sampler import random_samples
from teachercache.pipeline.places.durable import link
from teachercache.pipeline.places.local_storage import LocalStorage
from teachercache.pipeline.places.open_storage import open_storage
from teachercache.pipeline.places.storage import Storage
from teachercache.pipeline.places.whole_or_nothing import room_at, whole_or_nothing
from teachercache.pipeline.records.manifest import (
    SAMPLES_NAME,
    SPEC_NAME,
    VIEWS_NAME,
    CommitRecord,
    FileRecord,
    Manifest,
    QuarantineEntry,
    moments_name,
    quarantine_name,
    tables_name,
)
from teachercache.pipeline.records.rows import divide_views
from teachercache.pipeline.records.spec import IMAGES, CacheSpec, Segment, StoreKind, ViewPolicy
from teachercache.pipeline.records.tables import dataset_fingerprint, labels_hash, views_hash
from teachercache.pipeline.sources.place import Place
from teachercache.pipeline.stores.base import Arrays, numpy_dtype
from teachercache.pipeline.stores.image_tar import ImageTarWriter, image_tar_name

_BATCH_NBYTES = 1 << 26
_BLOCK_NBYTES = 1 << 22

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Step:
    """One shard of one teacher (or of "images") that the new cache shall have, by its number there."""

    teacher: str
    shard: int
    make: Callable[[], None]


@dataclass(frozen=True)
class Rearrangement:
    """A new cache that is laid out, and what is left to do to fill it."""

    url: str
    steps: list[Step]

    def run(self, progress: Callable[[], None] = lambda: None) -> FeatureCache:
        """Fill the cache; `progress` is called after each step.

        What a build into the same place, or the same command, has committed meanwhile stays. Raises
        `DiskSpaceError` when the place takes no more files.
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
        storage.sweep()  # what processes that died on the way left behind
        return FeatureCache.open(self.url)


def convert(url: str, out: str, store: StoreKind) -> Rearrangement:
    """The same rows in the other kind of store; content ids and `cache_id` stay, and so do the records.

    Raises `CacheMismatchError` where another cache is at `out`.
    """
    source = FeatureCache.open(url, checksums=True)
    if source.spec.store == store:
        raise CacheError(
            "There is nothing to convert.",
            got=f"{url}, a {store} cache",
            expected="a cache of the other kind",
            do="copy the folder, if a copy is wanted",
        )
    target = _lay_out(
        out, source.spec.changed(store=store), [source], source.samples, source.manifest.views(source.spec)
    )

    def rewrite(teacher: str, shard: int) -> None:
        record = source.commits(teacher)[shard]
        rows = np.array(source.spec.shard_rows(shard), np.int64)
        files = _write_rows(source, target, teacher, shard, rows, set(record.invalid_rows))
        statistics = moments_name(teacher, shard)
        if statistics in record.files:
            files[statistics] = record.files[statistics]
            _link_or_copy(source.storage, statistics, files[statistics], target.storage, statistics)
        _take_over_quarantine(source, target, shard, shard, 0)
        target.manifest.commit(record.model_copy(update={"files": files}))

    steps = [
        Step(name, shard, partial(rewrite, name, shard))
        for name, shard in _missing(source, target)
        if name != IMAGES
    ]
    images = [step for step in _whole_shards(source, target, 0) if step.teacher == IMAGES]
    return Rearrangement(target.storage.url, [*steps, *images])


def merge(urls: Sequence[str], out: str) -> Rearrangement:
    """One cache of several over disjoint samples of the same specs, in the order of `urls`.

    Rows keep their order within each; those of the first keep their numbers. Raises `CacheMismatchError`
    with every reason why these cannot be one cache.
    """
    sources = [FeatureCache.open(url) for url in urls]
    first = sources[0].spec
    differences = [
        f"{source.storage.url}: {reason}"
        for source in sources[1:]
        for reason in _differences(first, source.spec)
    ]
    keys = pa.chunked_array([chunk for source in sources for chunk in source.samples["key"].chunks])
    counts = pc.value_counts(keys)
    shared = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    if len(shared):
        examples = ", ".join(shared.slice(0, 3).to_pylist())
        differences.append(f"{len(shared):,} samples are in more than one of them: {examples}")
    if len(sources) < 2:
        differences.append("there is only one")
    if differences:
        raise CacheMismatchError(
            "These caches cannot be merged:\n  - " + "\n  - ".join(differences),
            expected="caches of disjoint samples with the same views, shards, images and teachers",
            do="build what differs again with one recipe, parts with codecs that learn tables with "
            "tables_from=FIRST; or take disjoint parts with `teachercache subset`",
        )
    location, tables = _one_location(sources)
    samples = pa.concat_tables(tables)
    offsets = [0, *accumulate(source.num_samples for source in sources)]
    shards = [0, *accumulate(source.spec.num_shards for source in sources)]
    segments, views = [], []
    for source, offset, shard in zip(sources, offsets, shards, strict=False):
        for segment in source.spec.segments:
            segments.append(
                Segment(
                    first_row=segment.first_row + shard * first.rows_per_shard,
                    samples=(segment.samples[0] + offset, segment.samples[1] + offset),
                    views=segment.views,
                    fingerprint=segment.fingerprint or source.spec.dataset.fingerprint,
                    views_hash=segment.views_hash,
                )
            )
        lines = source.manifest.views(source.spec)
        views.append(_with_samples(lines, lines["sample_index"].to_numpy() + offset))
    dataset = first.dataset.model_copy(
        update={
            "location": location,
            "listing": None,  # that of one part would let a later build pass over the images of the others
            "num_samples": samples.num_rows,
            "fingerprint": dataset_fingerprint(samples),
            "labels_hash": _labels_hash(sources, samples),
        }
    )
    spec = first.changed(dataset=dataset, segments=tuple(segments))
    target = _lay_out(out, spec, sources, samples, pa.concat_tables(views))
    steps: list[Step] = []
    for source, offset, shard in zip(sources, offsets, shards, strict=False):
        steps += _whole_shards(source, target, shard, offset)
    return Rearrangement(target.storage.url, steps)


def subset(
    url: str,
    out: str,
    *,
    keys: Iterable[str] | None = None,
    fraction: float | None = None,
    seed: int = 0,
    teachers: Sequence[str] | None = None,
) -> Rearrangement:
    """A cache of some samples (those of `keys`, or a random `fraction`) and some teachers of another.

    A smaller fraction with the same seed holds a part of what a larger one holds. Without a choice of
    samples, shards stay as they are; else their rows are packed anew. A shard whose rows are not all
    committed in the cache is left out, and is made when the same command runs after they are.
    """
    source = FeatureCache.open(url, checksums=True)
    names = source.check_teachers(teachers)
    kept = {name: source.spec.teachers[name] for name in names}
    fidelity = {name: value for name, value in source.spec.fidelity.items() if name in kept}
    if keys is None and fraction is None:
        spec = source.spec.changed(teachers=kept, fidelity=fidelity)
        target = _lay_out(out, spec, [source], source.samples, source.manifest.views(source.spec))
        return Rearrangement(target.storage.url, _whole_shards(source, target, 0))
    chosen = _chosen(source, keys, fraction, seed)
    samples = source.samples.take(pa.array(chosen))
    fingerprint = dataset_fingerprint(samples)
    segments, views = list[Segment](), list[pa.Table]()
    all_lines = source.manifest.views(source.spec)
    stated = all(segment.views_hash for segment in source.spec.segments)
    for part in divide_views((0, source.num_views), source.spec.rows_per_shard):
        end = segments[-1].first_row + segments[-1].num_rows if segments else 0
        first_row = -(-end // source.spec.rows_per_shard) * source.spec.rows_per_shard
        numbers = np.arange(*part)
        rows = source.index.rows(chosen[:, None], numbers[None])
        lines = all_lines.take(pa.array(source.index.locate(rows.ravel())[2]))
        views.append(_with_samples(lines, np.repeat(np.arange(len(chosen)), len(numbers))))
        segments.append(
            Segment(
                first_row=first_row,
                samples=(0, len(chosen)),
                views=part,
                fingerprint=fingerprint,
                views_hash=views_hash(views[-1], 0) if stated else None,
            )
        )
    dataset = source.spec.dataset.model_copy(
        update={
            "num_samples": len(chosen),
            "fingerprint": fingerprint,
            "labels_hash": _labels_hash([source], samples),
        }
    )
    spec = source.spec.changed(dataset=dataset, segments=tuple(segments), teachers=kept, fidelity=fidelity)
    target = _lay_out(out, spec, [source], samples, pa.concat_tables(views))
    return Rearrangement(target.storage.url, list(_packed_shards(source, target, chosen)))


def _labels_hash(sources: Sequence[FeatureCache], samples: pa.Table) -> str | None:
    """What could not be checked in the sources is not vouched for in what is made of them."""
    return labels_hash(samples) if all(source.spec.dataset.labels_hash for source in sources) else None


def _chosen(source: FeatureCache, keys: Iterable[str] | None, fraction: float | None, seed: int) -> Ints:
    """Ascending indices of the samples to keep."""
    if keys is not None and fraction is not None:
        raise CacheError("A subset is chosen by keys or by a fraction, not by both.", do="give one of them")
    if keys is not None:
        wanted = pa.array(sorted(set(keys)), pa.string())
        places = pc.index_in(wanted, value_set=source.samples["key"])
        if places.null_count:
            unknown = wanted.filter(pc.is_null(places)).to_pylist()
            near = difflib.get_close_matches(unknown[0], source.samples["key"].to_pylist(), 1)
            raise CacheError(
                f"{len(unknown)} of {len(wanted)} keys are not in this cache.",
                got=", ".join(unknown[:3]),
                expected=f"keys of {source.storage.url}/samples.parquet",
                do=f"did you mean {near[0]}?" if near else "give whole keys, one a line",
            )
        chosen = np.sort(places.to_numpy())
    else:
        assert fraction is not None
        chosen = random_samples(source.num_samples, fraction if 0 < fraction <= 1 else 0, seed)
    if not chosen.size:
        raise CacheError(
            "This subset would be empty.",
            got="no key" if keys is not None else f"a fraction of {fraction} of {source.num_samples} samples",
            expected="at least one sample",
            do="give more keys, or a greater fraction, at most 1",
        )
    return chosen.astype(np.int64)


def _lay_out(
    out: str, spec: CacheSpec, sources: Sequence[FeatureCache], samples: pa.Table, views: pa.Table
) -> FeatureCache:
    """The new cache, empty or as far as it got."""
    storage = open_storage(out)
    with room_at(storage.url), storage.exclusive(SPEC_NAME):
        return _begin(storage, spec, sources, samples, views)


def _begin(
    storage: Storage, spec: CacheSpec, sources: Sequence[FeatureCache], samples: pa.Table, views: pa.Table
) -> FeatureCache:
    manifest = Manifest(storage)
    if manifest.exists():
        found = manifest.spec()
        if (found.cache_id, found.store) != (spec.cache_id, spec.store):
            raise CacheMismatchError(
                "Another cache is at this path.",
                got=f"{storage.url}: {found.store}, cache_id {found.cache_id}",
                expected=f"nothing, or the beginning of this very cache: {spec.store}, {spec.cache_id}",
                do="choose another place (-o …)",
            )
        return FeatureCache(storage, found)
    target = FeatureCache(storage, spec)
    for name in (*spec.teachers, IMAGES):
        if left := manifest.committed(name):
            raise CacheMismatchError(
                "Shards of another cache are at this path.",
                got=f"{len(left)} commit records of {name} in {storage.url}, without {SPEC_NAME}",
                expected="nothing, or the beginning of this very cache",
                do="choose another place (-o …)",
            )
    layouts = [file for name in spec.teachers for file in target.store.layout_files(name)]
    new = [SPEC_NAME, SAMPLES_NAME, VIEWS_NAME, *map(tables_name, spec.teachers), *layouts]
    with whole_or_nothing(storage, new):
        for name in spec.teachers:
            tables = tables_name(name)
            if sources[0].storage.exists(tables):
                storage.write(tables, sources[0].storage.read(tables))
            target.store.create(name)
        manifest.create(spec, samples.slice(0, spec.dataset.num_samples), views.slice(0, spec.num_rows))
    return target


def _missing(source: FeatureCache, target: FeatureCache, shift: int = 0) -> Iterator[tuple[str, int]]:
    """(teacher, shard of `source`) that it has committed and `target`, `shift` shards on, has not."""
    for name in (*target.spec.teachers, *([IMAGES] if target.spec.images == "copy" else [])):
        done = target.manifest.committed(name)
        yield from ((name, shard) for shard in sorted(source.commits(name)) if shard + shift not in done)


def _whole_shards(
    source: FeatureCache, target: FeatureCache, shift: int, first_sample: int = 0
) -> list[Step]:
    """Steps that give `target` the shards of `source` under numbers greater by `shift`."""

    def names(cache: FeatureCache, teacher: str, shard: int, record: CommitRecord) -> list[str]:
        if teacher == IMAGES:
            return [image_tar_name(shard)]
        files = cache.store.shard_files(teacher, shard)
        has_statistics = any(name.startswith("stats/") for name in record.files)
        return [*files, moments_name(teacher, shard)] if has_statistics else files

    def take_over(teacher: str, shard: int) -> None:
        record, new_shard = source.commits(teacher)[shard], shard + shift
        old, new = names(source, teacher, shard, record), names(target, teacher, new_shard, record)
        if set(record.files) != set(old):
            raise _corrupt(source.storage, f"a record that names {sorted(record.files)}, not {old}")
        for name, new_name in zip(old, new, strict=True):
            _link_or_copy(source.storage, name, record.files[name], target.storage, new_name)
        _take_over_quarantine(source, target, shard, new_shard, first_sample)
        rows = shift * source.spec.rows_per_shard
        target.manifest.commit(
            record.model_copy(
                update={
                    "shard": new_shard,
                    "first_row": record.first_row + rows,
                    "invalid_rows": tuple(row + rows for row in record.invalid_rows),
                    "files": {new_name: record.files[name] for name, new_name in zip(old, new, strict=True)},
                }
            )
        )

    return [
        Step(name, shard + shift, partial(take_over, name, shard))
        for name, shard in _missing(source, target, shift)
    ]


def _take_over_quarantine(
    source: FeatureCache, target: FeatureCache, shard: int, new_shard: int, first_sample: int
) -> None:
    if source.storage.exists(quarantine_name(shard)):
        entries = [
            entry.model_copy(update={"sample_index": entry.sample_index + first_sample})
            for entry in source.manifest.read_quarantine(shard)
        ]
        target.manifest.write_quarantine(new_shard, entries, source.manifest.quarantine_source(shard))


def _packed_shards(source: FeatureCache, target: FeatureCache, chosen: Ints) -> Iterator[Step]:
    """Steps that fill `target`, whose sample i is sample `chosen[i]` of `source`."""
    reasons = {entry.sample_index: entry for entry in source.manifest.quarantine()}

    def invalid_rows(teacher: str) -> set[int]:
        """Every view of every sample that could not be decoded."""
        found = [row for record in source.commits(teacher).values() for row in record.invalid_rows]
        samples = np.unique(source.index.locate(found)[0])
        return set(source.index.rows(samples[:, None], np.arange(source.num_views)).ravel().tolist())

    def pack(teacher: str, shard: int, invalid: set[int], old: Ints) -> None:
        new = target.spec.shard_rows(shard)
        broken = [row for row, from_row in zip(new, old.tolist(), strict=True) if from_row in invalid]
        members: tuple[tuple[int, int], ...] = ()
        if teacher == IMAGES:
            files, members = _write_images(source, target, shard, chosen)
        else:
            files = _write_rows(source, target, teacher, shard, old, invalid)
        samples = np.unique(target.index.locate(broken)[0]).tolist()
        entries = [
            entry.model_copy(update={"sample_index": sample})
            for sample in samples
            if (entry := reasons.get(int(chosen[sample]))) is not None
        ]
        if entries:
            target.manifest.write_quarantine(shard, list[QuarantineEntry](entries))
        target.manifest.commit(
            CommitRecord(
                teacher=teacher,
                shard=shard,
                content_id=target.spec.shard_content_id(teacher, shard),
                first_row=new.start,
                num_rows=len(new),
                invalid_rows=tuple(broken),
                files=files,
                source_checksum="",
                members=members,
                seconds={},
                host=platform.node(),
                versions=source.spec.versions,
                finished=datetime.now(UTC).isoformat(timespec="seconds"),
            )
        )

    for teacher in (*target.spec.teachers, *([IMAGES] if target.spec.images == "copy" else [])):
        done, committed, invalid = target.manifest.committed(teacher), source.commits(teacher), None
        for shard in target.spec.shards(teacher):
            samples, views, _ = target.index.locate(target.spec.shard_rows(shard))
            old = source.index.rows(chosen[samples], views)
            needed = source.index.rows(chosen[samples], 0) if teacher == IMAGES else old
            if shard in done or not set((needed // source.spec.rows_per_shard).tolist()) <= committed.keys():
                continue
            invalid = invalid_rows(teacher) if invalid is None else invalid
            yield Step(teacher, shard, partial(pack, teacher, shard, invalid, old))


def _write_rows(
    source: FeatureCache, target: FeatureCache, teacher: str, shard: int, old: Ints, invalid: set[int]
) -> dict[str, FileRecord]:
    """Rows `old` of `source`, but for invalid ones, as a shard of `target`; encoded, as they are."""
    for old_shard in np.unique(old // source.spec.rows_per_shard).tolist():
        source.shards[teacher].require_sound(old_shard)  # what is wrong would be sealed as if it were right
    layouts = source.layouts(teacher)
    row_nbytes = sum(math.prod(layout.shape) * layout.dtype.itemsize for layout in layouts.values())
    valid = np.array([place for place, row in enumerate(old.tolist()) if row not in invalid], np.int64)
    with target.store.write_shard(teacher, shard) as writer:
        for places in np.array_split(valid, max(1, -(-valid.size * row_nbytes // _BATCH_NBYTES))):
            arrays: Arrays = {
                name: np.empty((len(places), *layout.shape), numpy_dtype(layout))
                for name, layout in layouts.items()
            }
            if len(places):
                source.store.read(teacher, old[places], arrays)
                writer.write(places.tolist(), arrays)
    return writer.files()


def _write_images(
    source: FeatureCache, target: FeatureCache, shard: int, chosen: Ints
) -> tuple[dict[str, FileRecord], tuple[tuple[int, int], ...]]:
    with ImageTarWriter.open(target.storage, shard) as tar:
        for sample in target.spec.shard_samples(shard):
            data = source.image_bytes(int(chosen[sample]))
            tar.add(target.key(sample), data or None)  # an image that was quarantined has no bytes
    return tar.files(), tuple(tar.members)


def _link_or_copy(source: Storage, name: str, record: FileRecord, target: Storage, new_name: str) -> None:
    if source.size(name) != record.nbytes:
        raise _corrupt(source, f"{name} with {source.size(name)} bytes, not the {record.nbytes} committed")
    if record.ends and source.ends([name], [record.nbytes]) != [record.ends]:
        raise _corrupt(source, f"{name} with other first or last bytes than were committed")
    if isinstance(source, LocalStorage) and isinstance(target, LocalStorage):
        path = target.path(new_name)
        path.unlink(missing_ok=True)  # without a record it does not exist
        try:
            link(source.path(name), path)
        except OSError:
            _copy(source, name, record, target, new_name)  # another file system, or one without links
    else:
        _copy(source, name, record, target, new_name)


def _copy(source: Storage, name: str, record: FileRecord, target: Storage, new_name: str) -> None:
    with source.open_read(name) as file, target.open_write(new_name) as copy:
        while block := file.read(_BLOCK_NBYTES):
            copy.write(block)
        if copy.checksum != record.checksum:
            raise _corrupt(source, f"{name} with checksum {copy.checksum}")


def _corrupt(source: Storage, got: str) -> CorruptShardError:
    return CorruptShardError(
        "A shard of this cache is broken.",
        got=got,
        expected="the files that the commit records state",
        do=f"run: teachercache repair {source.url}",
    )


def _with_samples(views: pa.Table, samples: NDArray[np.integer]) -> pa.Table:
    column = pa.array(samples.astype(np.int64))
    return views.set_column(0, views.schema.field("sample_index"), column)


def _differences(one: CacheSpec, other: CacheSpec) -> Iterator[str]:
    pairs: dict[str, tuple[object, object]] = {
        "rows_per_shard": (one.rows_per_shard, other.rows_per_shard),
        "images": (one.images, other.images),
        "covariance": (one.covariance, other.covariance),
        "store": (one.store, other.store),
        "source.kind": (one.dataset.kind, other.dataset.kind),
        "teachers": (sorted(one.teachers), sorted(other.teachers)),
    }
    for field in ViewPolicy.model_fields:
        pairs[f"views.{field}"] = getattr(one.views, field), getattr(other.views, field)
    for name in one.teachers.keys() & other.teachers.keys():
        before, after = (spec.teachers[name].model_dump(exclude={"checkpoint"}) for spec in (one, other))
        pairs |= {f"teachers.{name}.{field}": (before[field], after[field]) for field in before}
    for key, (first, second) in pairs.items():
        if first != second:
            yield f"{key}: the first cache has {first!r}, this one {second!r}"


def _one_location(sources: Sequence[FeatureCache]) -> tuple[str, list[pa.Table]]:
    """A folder that all images are below, and the sample tables with paths relative to it.

    By names alone: the images may be away, where caches hold copies.
    """
    locations = [source.spec.dataset.location for source in sources]
    if len(set(locations)) == 1:
        return locations[0], [source.samples for source in sources]
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
