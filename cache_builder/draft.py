"""From a recipe to a `CacheSpec`, before any teacher is loaded: scan the images, resolve the teachers."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property

import pyarrow as pa

from cache_builder.recipe import BuildRecipe
from cache_builder.teachers import resolve_teacher
from cache_builder.versions import versions
from pipeline.errors import CacheMismatchError
from pipeline.sources import Source, dataset_fingerprint, open_source
from pipeline.spec import CacheSpec, DatasetSpec, Segment, TeacherSpec
from pipeline.views import draw_views

_FOUND_OUT = {"checkpoint", "weights_hash", "tables_hash"}  # no recipe states them; workers compare hashes


@dataclass
class Draft:
    """A spec whose teachers have no weights hash yet, and the samples it is about."""

    spec: CacheSpec
    samples: pa.Table
    source: Source

    @cached_property
    def views(self) -> pa.Table:
        """The view table, one line a row."""
        segment = self.spec.segments[0]
        columns = [self.samples[name] for name in ("key", "width", "height")]
        key, width, height = columns[0].to_pylist(), columns[1].to_numpy(), columns[2].to_numpy()
        return draw_views(self.spec.views, key, width, height, segment.views)


def draft(recipe: BuildRecipe, progress: Callable[[int], None] | None = None) -> Draft:
    """Scan the source in parallel, telling `progress` of every new batch of samples; resolve the teachers."""
    teachers = {
        name: resolve_teacher(name, teacher, recipe.views.size, recipe.sak_compat)
        for name, teacher in recipe.teachers.items()
    }
    source = open_source(recipe.source.path, recipe.source.kind)
    samples = source.scan(workers=os.cpu_count() or 1, progress=progress)
    num_views = recipe.views.num_views
    spec = CacheSpec(
        dataset=DatasetSpec(
            kind=source.kind,
            location=source.location,
            num_samples=samples.num_rows,
            fingerprint=dataset_fingerprint(samples),
        ),
        views=recipe.views,
        rows_per_shard=max(recipe.rows_per_shard // num_views, 1) * num_views,
        images=recipe.images,
        segments=(Segment(first_row=0, samples=(0, samples.num_rows), views=(0, num_views)),),
        teachers=teachers,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
    )
    return Draft(spec, samples, source)


def merge_spec(existing: CacheSpec, wanted: CacheSpec, url: str) -> CacheSpec:
    """`existing` with the teachers that only `wanted` has.

    Raises `CacheMismatchError`, naming every difference, when the two cannot share one cache.
    """
    differences = [
        f"{field}: the cache has {old!r}, the recipe asks for {new!r}"
        for field, old, new in _pairs(existing, wanted)
        if old != new
    ]
    for name in existing.teachers.keys() & wanted.teachers.keys():
        old, new = existing.teachers[name].model_dump(), wanted.teachers[name].model_dump()
        differences += [
            f"teachers.{name}.{field}: the cache has {old[field]!r}, the recipe asks for {new[field]!r}"
            for field in TeacherSpec.model_fields.keys() - _FOUND_OUT
            if old[field] != new[field]
        ]
    if differences:
        raise CacheMismatchError(
            f"The cache at {url} was built with another spec:\n  - " + "\n  - ".join(differences),
            expected="a recipe whose rows are those of the cache",
            do="give the new cache another path (cache=…), or another name to a changed teacher",
        )
    return existing.model_copy(update={"teachers": {**wanted.teachers, **existing.teachers}})


def _pairs(existing: CacheSpec, wanted: CacheSpec) -> list[tuple[str, object, object]]:
    pairs: list[tuple[str, object, object]] = [
        ("number of samples", existing.dataset.num_samples, wanted.dataset.num_samples),
        ("dataset fingerprint", existing.dataset.fingerprint, wanted.dataset.fingerprint),
        ("rows_per_shard", existing.rows_per_shard, wanted.rows_per_shard),
        ("images", existing.images, wanted.images),
    ]
    old, new = existing.views.model_dump(), wanted.views.model_dump()
    return pairs + [(f"views.{field}", old[field], new[field]) for field in old]
