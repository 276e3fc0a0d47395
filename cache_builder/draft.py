"""From a recipe to a `CacheSpec`, before any teacher is loaded: scan the images, resolve the teachers.

A recipe states what a cache shall be. Where one is already, it grows to that: by teachers, by views, by
samples that are new in the source. What it holds stays as it is, and what cannot share one cache is refused.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from teachercache.cache_builder.build_recipe import BuildRecipe, with_checkpoints
from teachercache.cache_builder.calibrate import CalibrationSample
from teachercache.cache_builder.teachers import resolve_teachers
from teachercache.cache_builder.teachers.teacher import versions
from teachercache.pipeline.codecs import get_codec
from teachercache.pipeline.errors import CacheMismatchError, Problems, RecipeError
from teachercache.pipeline.places.open_storage import open_storage
from teachercache.pipeline.records.manifest import Manifest
from teachercache.pipeline.records.rows import divide_views
from teachercache.pipeline.records.spec import CacheSpec, DatasetSpec, Segment, TeacherSpec
from teachercache.pipeline.records.tables import dataset_fingerprint, labels_hash
from teachercache.pipeline.sources import Source, open_source
from teachercache.pipeline.sources.keys import OK
from teachercache.pipeline.views import ViewTable, draw_segment

_SPARE = 2.0  # more samples than rows are wanted for a calibration, since some may not decode
_FOUND_OUT = {"weights_hash", "tables_hash"}  # weights are compared by their hash, once loaded


@dataclass
class Draft:
    """A spec whose new teachers have no weights hash yet, and the samples it is about.

    `manifest` is that of the cache's place, `old` the spec of the cache that is there. Both specs look for
    weights where the recipe says they are; `old_places` has the teachers for which `cache.json` says
    otherwise, and what it says. `left_out` counts what a scan found in the source beside images.
    """

    spec: CacheSpec
    samples: pa.Table
    source: Source
    manifest: Manifest
    old: CacheSpec | None = None
    old_places: Mapping[str, str | None] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)

    @cached_property
    def views(self) -> pa.Table:
        """The view table, one line a row: those that are stored, and behind them those of new segments."""
        stored = [] if self.old is None else [self.manifest.views(self.old)]
        new = self.spec.segments[len(self.old.segments) if self.old else 0 :]
        drawn = [draw_segment(self.spec.views, segment, self.samples) for segment in new]
        return pa.concat_tables(stored + drawn)

    def calibration_sample(self, num_rows: int) -> CalibrationSample:
        """Of usable samples, evenly spread, a view each."""
        usable = np.flatnonzero(np.asarray(self.samples["status"]) == OK)
        count = min(int(num_rows * _SPARE), usable.size)
        chosen = usable[np.linspace(0, usable.size - 1, count).astype(int)]
        num_views = self.views.num_rows // self.samples.num_rows
        lines = np.argsort(self.views["sample_index"].to_numpy(), kind="stable")  # sample by sample
        table = ViewTable(self.views, self.spec.views.photometric)
        views = [table.view(int(lines[one * num_views + i % num_views])) for i, one in enumerate(chosen)]
        places = [
            self.samples[name].take(pa.array(chosen)).to_pylist() for name in ("path", "offset", "nbytes")
        ]
        rows = min(num_rows, usable.size)
        return CalibrationSample(self.source, tuple(zip(*places, strict=True)), tuple(views), rows)


def growth(old: CacheSpec, new: CacheSpec) -> list[str]:
    """What `new` has and `old` has not, in words."""
    counts = {
        "samples": new.dataset.num_samples - old.dataset.num_samples,
        "views of each sample": new.views.num_views - old.views.num_views,
    }
    grown = [f"{count:,} {what}" for what, count in counts.items() if count]
    return grown + [f"teacher {name}" for name in new.teachers if name not in old.teachers]


def draft(recipe: BuildRecipe, progress: Callable[[int], None] | None = None) -> Draft:
    """Scan the source in parallel, telling `progress` of every new batch of samples; resolve the teachers.

    Nothing is scanned where the cache knows this very listing of the source. What does not work of the
    teachers and the source is raised as one, before the scan.
    """
    problems = Problems()
    teachers = teachers_of(recipe, problems)
    with problems.noted():
        source = open_source(recipe.source.path, recipe.source.kind)
    problems.require_none()
    left_out = Counter[str]()
    manifest, listing = Manifest(open_storage(recipe.cache)), source.listing()
    if manifest.exists() and (old := manifest.spec()).dataset.listing == listing:
        samples = manifest.samples(old)
    else:
        samples = source.scan(workers=os.cpu_count() or 1, progress=progress, left_out=left_out)
    dataset = DatasetSpec(
        kind=source.kind,
        location=source.location,
        num_samples=samples.num_rows,
        fingerprint=dataset_fingerprint(samples),
        listing=listing,
        labels_hash=labels_hash(samples),
    )
    return Draft(spec_of(recipe, dataset, teachers), samples, source, manifest, left_out=left_out)


def teachers_of(recipe: BuildRecipe, problems: Problems) -> dict[str, TeacherSpec]:
    """The teachers, without weights hashes; why one cannot be is noted in `problems`."""
    found = dict[str, TeacherSpec]()
    for name, teacher in recipe.teachers.items():
        with problems.noted():
            found |= resolve_teachers({name: teacher}, recipe.views, recipe.sak_compat)
            if get_codec(teacher.codec).needs_compressor and not recipe.compressor:
                raise RecipeError(
                    f"Codec {teacher.codec} of teacher {name} saves nothing alone.",
                    got="no compressor",
                    expected="one that shrinks rounded numbers",
                    do="add compressor=zstd, or choose another codec",
                )
    return found


def spec_of(recipe: BuildRecipe, dataset: DatasetSpec, teachers: Mapping[str, TeacherSpec]) -> CacheSpec:
    """The spec of a new cache of `dataset`."""
    num_views = recipe.views.num_views
    return CacheSpec(
        dataset=dataset,
        views=recipe.views,
        rows_per_shard=_whole_samples(recipe.rows_per_shard, num_views),
        images=recipe.images,
        store=recipe.store,
        compressor=recipe.compressor,
        covariance=recipe.covariance,
        segments=(Segment(first_row=0, samples=(0, dataset.num_samples), views=(0, num_views)),),
        teachers=dict(teachers),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
    )


def _whole_samples(rows_per_shard: int, num_views: int) -> int:
    return max(rows_per_shard // num_views, 1) * num_views


def extend(recipe: BuildRecipe, drafted: Draft) -> Draft:
    """The cache that is there with the samples, views and teachers that only `drafted` has.

    Raises `CacheMismatchError`, naming every difference, when the two cannot share one cache.
    """
    manifest, wanted = drafted.manifest, drafted.spec
    old = manifest.spec()
    stored = manifest.samples(old)
    differences = [*_sample_differences(stored, drafted.samples), *_spec_differences(recipe, old, wanted)]
    is_new = pc.invert(pc.is_in(drafted.samples["key"], value_set=stored["key"]))
    new = drafted.samples.filter(is_new)
    one_place = old.dataset.kind == wanted.dataset.kind and _lies_the_same(stored, drafted.samples)
    if new.num_rows and not differences and not one_place:
        differences.append(
            f"source: there are {new.num_rows:,} new images, but the old ones lie elsewhere than in "
            f"{old.dataset.location}"
        )
    if differences:
        raise CacheMismatchError(
            f"The cache at {manifest.storage.url} was built with another spec:\n  - "
            + "\n  - ".join(differences),
            expected="a recipe with the rows of the cache; it may add samples, views and teachers",
            do="give the new cache another path (cache=…), or another name to a changed teacher",
        )
    places = {
        name: teacher.checkpoint
        for name, teacher in recipe.teachers.items()
        if name in old.teachers and teacher.checkpoint not in (None, old.teachers[name].checkpoint)
    }
    old_places = {name: old.teachers[name].checkpoint for name in places}
    old = with_checkpoints(old, places)
    spec = old.changed(teachers={**wanted.teachers, **old.teachers})
    samples = pa.concat_tables([stored, new])
    if new.num_rows or wanted.views.num_views > old.views.num_views:
        spec = _with_rows(spec, wanted, samples, new)
    return Draft(spec, samples, drafted.source, manifest, old, old_places)


def _with_rows(old: CacheSpec, wanted: CacheSpec, samples: pa.Table, new: pa.Table) -> CacheSpec:
    """`old` with segments for the new views of its samples, and for all views of the new samples."""
    segments = [
        segment.model_copy(update={"fingerprint": segment.fingerprint or old.dataset.fingerprint})
        for segment in old.segments
    ]
    count, num_views = old.dataset.num_samples, wanted.views.num_views
    blocks = [
        ((0, count), (old.views.num_views, num_views), old.dataset.fingerprint),
        ((count, samples.num_rows), (0, num_views), dataset_fingerprint(new)),
    ]
    per_shard = old.rows_per_shard
    for (first, end), views, fingerprint in blocks:
        for part in divide_views(views, per_shard) if end > first else ():
            shards = -(-(segments[-1].first_row + segments[-1].num_rows) // per_shard)
            segments.append(
                Segment(
                    first_row=shards * per_shard, samples=(first, end), views=part, fingerprint=fingerprint
                )
            )
    dataset = old.dataset.model_copy(
        update={
            "num_samples": samples.num_rows,
            "fingerprint": dataset_fingerprint(samples),
            "labels_hash": labels_hash(samples),
        }
        | (wanted.dataset.model_dump(include={"location", "listing"}) if new.num_rows else {})
    )
    policy = old.views.model_copy(update={"num_views": num_views})
    return old.changed(dataset=dataset, views=policy, segments=tuple(segments))


def _sample_differences(stored: pa.Table, scanned: pa.Table) -> Iterator[str]:
    places = pc.index_in(stored["key"], value_set=scanned["key"])
    gone = pc.is_null(places).to_numpy()
    kept, there = stored.filter(pa.array(~gone)), scanned.take(places.drop_null())
    changed = np.zeros(kept.num_rows, bool)
    for name in ("nbytes", "width", "height", "head_hash"):
        known = kept[name].to_numpy()
        unread = known == 0 if name in ("width", "height") else False  # a later version may read it
        changed |= (known != there[name].to_numpy()) & ~np.asarray(unread)
    for what, keys in (
        ("are gone from the source", stored["key"].filter(pa.array(gone))),
        ("are other images now", kept["key"].filter(pa.array(changed))),
    ):
        if len(keys):
            examples = ", ".join(keys.slice(0, 3).to_pylist())
            yield f"dataset fingerprint: {len(keys):,} of {len(stored):,} samples {what}: {examples}"


def _lies_the_same(stored: pa.Table, scanned: pa.Table) -> bool:
    """Whether one location serves both: the stored samples are where the scan found them."""
    there = scanned.take(pc.index_in(stored["key"], value_set=scanned["key"]).drop_null())
    return all(stored[name].equals(there[name]) for name in ("path", "offset"))


def _spec_differences(recipe: BuildRecipe, old: CacheSpec, wanted: CacheSpec) -> Iterator[str]:
    rows_per_shard = _whole_samples(recipe.rows_per_shard, old.segments[0].num_views)
    may_differ = {"source.kind", "teachers"}
    if wanted.views.num_views > old.views.num_views:
        may_differ.add("views.num_views")
    differences = old.differences(wanted.model_copy(update={"rows_per_shard": rows_per_shard}))
    for what, (one, other) in differences.items():
        if what not in may_differ and what.rpartition(".")[2] not in _FOUND_OUT:
            yield f"{what}: the cache has {one!r}, the recipe asks for {other!r}"
