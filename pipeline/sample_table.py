"""What is known of every sample: one line each, whatever the source; samples.parquet of a cache.

path: relative to the source's folder. offset: bytes into that file (Parquet: row number in it).
width, height: pixels, EXIF orientation applied; 0 unless status is "ok". status: "ok" or the reason
why there is no such image. head_hash: xxh3-64 of the file's first bytes (`HEAD_BYTES`).
"""

from __future__ import annotations

import pyarrow as pa

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
