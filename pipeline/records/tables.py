"""The two tables of a cache: samples.parquet, one line per sample, and views.parquet, one line per row.

`cache.json` holds hashes of all columns that decide what a row means; the hashes ignore where images lie.

path: relative to the source's folder. offset: bytes into that file (Parquet: row number in it).
width, height: pixels, EXIF orientation applied; 0 unless status is "ok". status: "ok" or the reason
why there is no such image. head_hash: xxh3-64 of the file's first bytes (`HEAD_BYTES`).
"""

import difflib
import io
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from teachercache.pipeline.errors import UnknownKeyError
from teachercache.pipeline.records.limits import check_table
from teachercache.pipeline.records.seal import UNSEALED, seal
from teachercache.pipeline.records.spec import CacheSpec, Segment

_NEAR_KEYS = 5

SAMPLE_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("path", pa.string()),
        ("offset", pa.int64()),
        ("nbytes", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("label", pa.string()),
        ("status", pa.string()),
        ("head_hash", pa.uint64()),
    ]
)

VIEW_SCHEMA = pa.schema(
    [
        ("sample_index", pa.int64()),
        ("view_index", pa.int32()),
        ("left", pa.float32()),
        ("top", pa.float32()),
        ("right", pa.float32()),
        ("bottom", pa.float32()),
        ("flip", pa.bool_()),
        ("brightness", pa.float32()),
        ("contrast", pa.float32()),
        ("saturation", pa.float32()),
        ("hue", pa.float32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
    ]
)


def dataset_fingerprint(samples: pa.Table) -> str:
    """xxh3-128, in hex, of what the samples are: key, nbytes, width, height, head_hash.

    `samples` is sorted by key, as `scan` returns it. It does not matter where the images lie, nor when, on
    which machine and by how many workers they were listed.
    """
    digest = xxhash.xxh3_128()
    _add_text(digest, samples["key"])
    for name in ("nbytes", "width", "height", "head_hash"):
        digest.update(samples[name].to_numpy().tobytes())
    return digest.hexdigest()


def labels_hash(samples: pa.Table) -> str:
    """xxh3-128, in hex, of the samples' labels."""
    digest = xxhash.xxh3_128()
    _add_text(digest, samples["label"].fill_null("\0"))
    return digest.hexdigest()


def views_hash(views: pa.Table, first_sample: int) -> str:
    """xxh3-128, in hex, of all columns of a segment's lines; samples are counted from its first one."""
    digest = xxhash.xxh3_128(np.asarray(views["sample_index"].to_numpy() - first_sample).tobytes())
    for name in views.schema.names:
        if name != "sample_index":
            digest.update(f"{name} {views.schema.field(name).type}".encode())
            digest.update(views[name].to_numpy().tobytes())
    return digest.hexdigest()


def _add_text(digest: xxhash.xxh3_128, column: pa.ChunkedArray) -> None:
    values = column.cast(pa.large_binary()).combine_chunks()
    _, offsets, text = values.buffers()
    ends = np.frombuffer(offsets, np.int64)[values.offset : values.offset + len(values) + 1]
    digest.update(np.diff(ends).tobytes())
    digest.update(memoryview(text)[ends[0] : ends[-1]])


def find_key(keys: pa.ChunkedArray, key: str, *, whole: bool = False) -> int:
    """The index of `key`, or unless it is `whole` of the only key that ends in it: behind a slash, or else
    anywhere.

    Raises `UnknownKeyError` naming those that end so, or else the nearest.
    """
    index: int = pc.index(keys, key).as_py()
    if index >= 0:
        return index
    found = np.array([], np.int64)
    for end in () if whole else (f"/{key}", key):
        found = np.flatnonzero(pc.ends_with(keys, end).to_numpy())
        if found.size:
            break
    if len(found) == 1:
        return int(found[0])
    near = found if found.size else np.flatnonzero(pc.match_substring(keys, key).to_numpy())
    names = keys.take(near[:_NEAR_KEYS]).to_pylist() or difflib.get_close_matches(key, keys.to_pylist(), 3)
    raise UnknownKeyError(
        f"{len(found)} samples have keys that end so." if found.size else "No sample has this key.",
        got=key,
        expected=f"one of {', '.join(names)}, …" if names else "a key of samples.parquet, or the end of one",
        do="give the whole key",
    )


def segment_lines(spec: CacheSpec, views: pa.Table) -> Iterator[tuple[Segment, pa.Table]]:
    """Each segment with its lines of the view table."""
    start = 0
    for segment in spec.segments:
        yield segment, views.slice(start, segment.num_rows)
        start += segment.num_rows


def with_views_hashes(spec: CacheSpec, views: pa.Table) -> tuple[Segment, ...]:
    """The segments of `spec`, each with the hash of its lines."""
    return tuple(
        segment.model_copy(update={"views_hash": views_hash(lines, segment.samples[0])})
        for segment, lines in segment_lines(spec, views)
    )


def table_line(file: IO[bytes], index: int) -> dict[str, Any]:
    """One line of a table, of which only its row group is read. Raises `ArrowException`, or `IndexError` or
    `RuntimeError` for a table that ends before it."""
    table, group = pq.ParquetFile(file), 0
    while index >= (lines := table.metadata.row_group(group).num_rows):
        index, group = index - lines, group + 1
    return table.read_row_group(group).slice(index, 1).to_pylist()[0]


def table_bytes(table: pa.Table) -> bytes:
    """The table as Parquet. Its checksum is among the key-value pairs at the end of the file."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"checksum": UNSEALED})
    return seal(sink.getvalue())


def table_lines(data: bytes, schema: pa.Schema, num_rows: int) -> pa.Table:
    """The first `num_rows` lines of a Parquet file. Raises `ValueError` for other data, `ArrowException`."""
    check_table(data)
    with pq.ParquetFile(pa.BufferReader(data)) as file:
        if file.metadata.num_rows < num_rows:
            raise ValueError(f"{file.metadata.num_rows:,} lines, expected {num_rows:,}")
        table = file.read().cast(schema)
    table.validate(full=True)  # such as text that is not UTF-8
    for column in set(schema.names) - {"label"}:
        if table[column].null_count:
            raise pa.ArrowInvalid(f"{column} has lines without a value")
    return table.slice(0, num_rows)
