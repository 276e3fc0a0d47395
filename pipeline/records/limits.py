"""Bounds on what a cache may state: sizes in `cache.json` decide what is allocated, so check them first.

The limits are far above any cache that makes sense, and far below what a number in a file can request.
"""

from collections.abc import Iterator
from itertools import combinations
from math import prod

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from teachercache.pipeline.errors import CacheError
from teachercache.pipeline.places.storage import safe_name
from teachercache.pipeline.records.spec import IMAGES, CacheSpec, Segment

MAX_SAMPLES = 1 << 31
MAX_ROWS = 1 << 33
MAX_SHARDS = 1 << 24
MAX_ROWS_PER_SHARD = 1 << 20
MAX_SIDE = 1 << 14  # pixels of a view, tokens of a grid
MAX_VALUES_PER_ROW = 1 << 28
MAX_ROWS_PER_FILE_BYTE = 64  # of the tables; run lengths could turn a few bytes into terabytes
_LINES_AT_ONCE = 64
MAX_TABLE_NBYTES, MAX_NBYTES_PER_LINE = 1 << 28, 1 << 10  # of a table, on disk and in memory, added up


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
            raise _implausible("a segment", segment, "blocks of existing samples, in order")
        end = segment.first_row + segment.num_rows
        covered += segment.num_rows
    overlap = any(_overlap(one, other) for one, other in combinations(spec.segments, 2))
    if overlap or covered != spec.dataset.num_samples * spec.views.num_views:
        raise _implausible("its segments", covered, "every view of every sample exactly once")


def check_table(data: bytes) -> None:
    """Raises `ValueError` for a Parquet table whose lines would take far more memory than ours do.

    A long text in a dictionary can repeat in every line, so texts are checked before they are expanded, and
    all of them only where the longest, in every line, would be too much.
    """
    with pq.ParquetFile(pa.BufferReader(data)) as file:
        num_rows, columns = file.metadata.num_rows, file.schema_arrow
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    limit = MAX_TABLE_NBYTES + MAX_NBYTES_PER_LINE * num_rows
    parts = (group.column(i) for group in groups for i in range(group.num_columns))
    nbytes = sum(part.total_uncompressed_size for part in parts)
    if num_rows > MAX_ROWS_PER_FILE_BYTE * len(data) or nbytes > limit:
        raise ValueError(f"{num_rows:,} lines of {nbytes:,} bytes in {len(data):,} bytes")
    texts = [field.name for field in columns if pa.types.is_string(field.type)]
    with pq.ParquetFile(pa.BufferReader(data), read_dictionary=texts) as file:
        for name in texts:
            first = [next(file.iter_batches(1, [number], [name]))[0] for number in range(len(groups))]
            longest = max(
                (pc.max(pc.binary_length(part.dictionary)).as_py() or 0 for part in first), default=0
            )
            if longest * num_rows <= limit:
                continue
            nbytes = 0
            for batch in file.iter_batches(_LINES_AT_ONCE, columns=[name]):  # a footer may lie
                nbytes += pc.sum(pc.binary_length(batch[0].dictionary).take(batch[0].indices)).as_py() or 0
                if nbytes > limit:
                    raise ValueError(f"{num_rows:,} lines with {nbytes:,} bytes of {name} and more")


def _overlap(one: Segment, other: Segment) -> bool:
    sides = (one.samples, other.samples), (one.views, other.views)
    return all(a[0] < b[1] and b[0] < a[1] for a, b in sides)


def _sizes(spec: CacheSpec) -> Iterator[tuple[str, int, int]]:
    yield "dataset.num_samples", spec.dataset.num_samples, MAX_SAMPLES
    yield "rows_per_shard", spec.rows_per_shard, MAX_ROWS_PER_SHARD
    yield "the number of rows", spec.segments[-1].first_row + spec.segments[-1].num_rows, MAX_ROWS
    yield "the number of shards", spec.num_shards, MAX_SHARDS
    for side in spec.views.stored_size:
        yield "views.size and margin", side, MAX_SIDE
    if spec.images == "rendered":
        yield "the number of values of a view", 3 * prod(spec.views.stored_size), MAX_VALUES_PER_ROW
    for name, teacher in spec.teachers.items():
        for side in (*teacher.image_size, *teacher.render_size, *teacher.native_grid, *teacher.stored_grid):
            yield f"teachers.{name}: a side of an image or a grid", side, MAX_SIDE
        values = teacher.num_levels * teacher.width * prod(teacher.stored_grid)
        yield f"teachers.{name}: the number of values of a row", values, MAX_VALUES_PER_ROW
        yield f"teachers.{name}: width", teacher.width, MAX_VALUES_PER_ROW
        if teacher.global_width is not None:
            yield f"teachers.{name}: global_width", teacher.global_width, MAX_VALUES_PER_ROW


def _implausible(what: str, got: object, expected: str) -> CacheError:
    return CacheError(
        f"This cache states an impossible value: {what}.",
        got=got,
        expected=expected,
        do="do not use this cache: it was damaged or made to do harm",
    )
