"""What a cache may say of itself. Sizes in `cache.json` decide what is allocated, so they are bounded first.

The limits are far above any cache that makes sense, and far below what a number in a file can ask for.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from math import prod

from pipeline.errors import CacheError
from pipeline.spec import IMAGES, CacheSpec, Segment, TeacherSpec
from pipeline.storage import safe_name

MAX_SAMPLES = 1 << 31
MAX_ROWS = 1 << 33
MAX_SHARDS = 1 << 24
MAX_ROWS_PER_SHARD = 1 << 20
MAX_SIDE = 1 << 14  # pixels of a view, tokens of a grid
MAX_VALUES_PER_ROW = 1 << 28
MAX_ROWS_PER_FILE_BYTE = 64  # of the tables; run lengths could ask for terabytes from a few bytes


def check_limits(spec: CacheSpec) -> None:
    """Raises `CacheError`, naming what is out of bounds."""
    for what, value, most in _sizes(spec):
        if not 1 <= value <= most:
            raise _implausible(what, value, f"a number from 1 to {most:,}")
    for name in spec.teachers:
        if safe_name(name) != name or "/" in name or name in (".", IMAGES):
            raise _implausible("a teacher's name", repr(name), f"a plain file name other than {IMAGES}")
    end = covered = 0
    for segment in spec.segments:
        (start, stop), (first, last) = segment.samples, segment.views
        whole_shards = segment.first_row % spec.rows_per_shard == 0 and segment.first_row >= end
        if not (whole_shards and 0 <= start < stop <= spec.dataset.num_samples and 0 <= first < last):
            raise _implausible("a segment", segment, "blocks of existing samples, one behind the other")
        end = segment.first_row + segment.num_rows
        covered += segment.num_rows
    overlap = any(_overlap(one, other) for one, other in combinations(spec.segments, 2))
    if overlap or covered != spec.dataset.num_samples * spec.views.num_views:
        raise _implausible("its segments", covered, "every view of every sample exactly once")


def _overlap(one: Segment, other: Segment) -> bool:
    return all(
        a[0] < b[1] and b[0] < a[1] for a, b in ((one.samples, other.samples), (one.views, other.views))
    )


def _sizes(spec: CacheSpec) -> Iterator[tuple[str, int, int]]:
    yield "dataset.num_samples", spec.dataset.num_samples, MAX_SAMPLES
    yield "rows_per_shard", spec.rows_per_shard, MAX_ROWS_PER_SHARD
    yield "the number of rows", spec.segments[-1].first_row + spec.segments[-1].num_rows, MAX_ROWS
    yield "the number of shards", spec.num_shards, MAX_SHARDS
    for side in spec.views.size:
        yield "views.size", side, MAX_SIDE
    for name, teacher in spec.teachers.items():
        for what, value, most in _teacher_sizes(teacher):
            yield f"teachers.{name}: {what}", value, most


def _teacher_sizes(teacher: TeacherSpec) -> Iterator[tuple[str, int, int]]:
    for side in (*teacher.image_size, *teacher.render_size, *teacher.native_grid, *teacher.stored_grid):
        yield "a side of an image or a grid", side, MAX_SIDE
    values = teacher.num_levels * teacher.width * prod(teacher.stored_grid)
    yield "the number of values of a row", values, MAX_VALUES_PER_ROW
    yield "width", teacher.width, MAX_VALUES_PER_ROW
    if teacher.global_width is not None:
        yield "global_width", teacher.global_width, MAX_VALUES_PER_ROW


def _implausible(what: str, got: object, expected: str) -> CacheError:
    return CacheError(
        f"This cache states what cannot be: {what}.",
        got=got,
        expected=expected,
        do="do not use this cache: it was damaged or made to do harm",
    )
