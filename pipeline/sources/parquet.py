"""Parquet files in the Hub's image layout, such as `ILSVRC/imagenet-1k`.

Column `image` is struct{bytes, path}, whose `path` is not read; the optional column `label` holds integers
or names.
"""

import os
from collections.abc import Iterator
from functools import lru_cache
from itertools import repeat
from posixpath import splitext
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from teachercache.pipeline.errors import ImageDecodeError, SourceError
from teachercache.pipeline.places.open_storage import open_storage
from teachercache.pipeline.sources.keys import printable
from teachercache.pipeline.sources.source import SampleRows, Scanned, Source

_ROWS_PER_BATCH = 256
_ROW_GROUPS_KEPT = 4
_FOOTERS_KEPT = 4096


class _RowGroup(NamedTuple):
    """Rows [first_row, first_row + num_rows) of a file; none, if it cannot be read."""

    path: str
    group: int
    first_row: int
    num_rows: int


class ParquetSource(Source):
    """A Parquet file, or those of a folder or pattern (such as `data/train-*.parquet`).

    The key is `<file without suffix>/<row>`, never a name from `image.path`, so that samples, which are
    sorted by key, keep the order of the rows. To read a row, its whole row group is decoded, and the last
    few groups are kept: reading in the order of the file is cheap, any other order is not. The Hub's
    imagenet-1k is shuffled: sorted by `image.path`, each image would cost a row group.
    """

    kind = "parquet"
    container = ".parquet"

    def units(self) -> Iterator[_RowGroup]:
        for path, _ in self._containers():
            try:
                footer = _footer(self.place.storage.url, path)
            except pa.ArrowInvalid:
                yield _RowGroup(path, 0, 0, 0)
                continue
            schema = footer.schema.to_arrow_schema()
            if "image" not in schema.names or not _holds_images(schema.field("image").type):
                raise SourceError(
                    f"{path} is not in the Hub's image layout.",
                    got=", ".join(f"{field.name}: {field.type}" for field in schema),
                    expected="a column image: struct<bytes: binary, …>, and optionally a column label",
                    do="save it with `datasets` and a column of type Image(), or choose other files with a "
                    "pattern",
                )
            first_row = 0
            for group in range(footer.num_row_groups):
                num_rows = footer.row_group(group).num_rows
                yield _RowGroup(path, group, first_row, num_rows)
                first_row += num_rows

    def scan_unit(self, unit: _RowGroup) -> Scanned:
        rows, row = SampleRows(), unit.first_row
        try:
            with _open(self.place.storage.url, unit.path) as file:
                for field in file.schema_arrow:
                    if field.name != "image" and _holds_images(field.type):
                        rows.left_out[f"image in column {printable(field.name)}"] += unit.num_rows
                for batch in _batches(file, unit.group, ["image.bytes", "label"]):
                    labels = batch["label"].to_pylist() if "label" in batch.schema.names else repeat(None)
                    for data, label in zip(_images(batch), labels, strict=False):
                        _add(rows, unit.path, row, data, label)
                        row += 1
        except (pa.ArrowException, OSError) as error:
            if _is_system_error(error):
                raise
            last = unit.first_row + unit.num_rows - 1
            lost = f"rows {row:,} to {last:,}" if unit.num_rows else "the Parquet file"
            rows.reject(unit.path, row, 0, f"{lost} cannot be read: {_reason(error)}")
        return rows.scanned()

    def read(self, path: str, offset: int, nbytes: int) -> bytes:
        try:
            first_rows = _first_rows(self.place.storage.url, path)
            group = int(np.searchsorted(first_rows, offset, side="right")) - 1
            with _LOCKS[group % len(_LOCKS)]:
                images = _row_group(self.place.storage.url, path, group)
            data = images[offset - first_rows[group]].as_py()
        except FileNotFoundError as error:
            raise self._gone(path) from error
        except (pa.ArrowException, OSError, IndexError) as error:
            if _is_system_error(error):
                raise
            raise ImageDecodeError(f"row {offset:,} of {path} cannot be read: {_reason(error)}") from error
        return self._unchanged(data, path, nbytes)


def _add(rows: SampleRows, path: str, row: int, data: pa.Scalar, label: object) -> None:
    key = f"{splitext(path)[0]}/{row:08d}"
    if not data.is_valid:
        rows.reject(path, row, 0, "the row has null bytes", key)
        return
    buffer, text = data.as_buffer(), None if label is None else str(label)
    rows.add(key, key, path, row, buffer.size, text, lambda nbytes: buffer.slice(0, nbytes).to_pybytes())


def _images(batch: pa.RecordBatch) -> pa.Array:
    """The encoded images of the rows; the bytes are not copied."""
    return pc.struct_field(batch.column("image"), "bytes")


def _holds_images(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    content = kind.field("bytes").type
    return bool(pa.types.is_binary(content) or pa.types.is_large_binary(content))


def _open(url: str, path: str) -> pq.ParquetFile:
    return pq.ParquetFile(open_storage(url).open_read(path))


def _batches(file: pq.ParquetFile, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    return file.iter_batches(_ROWS_PER_BATCH, row_groups=[group], columns=columns, use_threads=False)


@lru_cache(_FOOTERS_KEPT)
def _footer(url: str, path: str) -> Any:
    with _open(url, path) as file:
        return file.metadata


@lru_cache(_FOOTERS_KEPT)
def _first_rows(url: str, path: str) -> np.ndarray:
    footer = _footer(url, path)
    sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    return np.cumsum([0, *sizes[:-1]])


@lru_cache(_ROW_GROUPS_KEPT)
def _row_group(url: str, path: str, group: int) -> pa.ChunkedArray:
    """The encoded images of a row group, cached per process, so that a source itself holds no state."""
    with _open(url, path) as file:
        return pa.chunked_array([_images(batch) for batch in _batches(file, group, ["image.bytes"])])


# Threads that reach a new row group together decode it once. Groups share locks, so that there are few.
_LOCKS = [Lock() for _ in range(16)]


def _renew_locks() -> None:
    _LOCKS[:] = [Lock() for _ in _LOCKS]


os.register_at_fork(after_in_child=_renew_locks)  # the thread that holds one does not exist in the child


def _is_system_error(error: Exception) -> bool:
    """Whether the disk or the network failed, rather than the file's content."""
    return getattr(error, "errno", None) is not None


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0]
