"""The two tables of a cache: samples.parquet, one line a sample, and views.parquet, one line a row.

`cache.json` holds hashes of what in the tables decides what a row means; where images lie is not in them.

path: relative to the source's folder. offset: bytes into that file (Parquet: row number in it).
width, height: pixels, EXIF orientation applied; 0 unless status is "ok". status: "ok" or the reason
why there is no such image. head_hash: xxh3-64 of the file's first bytes (`HEAD_BYTES`).
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import xxhash

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

    `samples` is sorted by key, as `scan` gives it. Where the images lie, how they were listed and by
    how many workers, on which machine and when does not matter.
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
