"""One shard, one row or one sample of a cache, as plain data. No torch here, as in `summary.py`.

A row's chunks are read from the shard files and their checksums compared; float features give norms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import safetensors.numpy
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError

from teachercache.jobs.inspection.summary import (
    Problems,
    array_metadata,
    describe,
    file_problems,
    quarantined,
)
from teachercache.pipeline.errors import CacheError
from teachercache.pipeline.places.storage import Storage
from teachercache.pipeline.records.manifest import SAMPLES_NAME, VIEWS_NAME, CommitRecord, Manifest
from teachercache.pipeline.records.rows import RowIndex
from teachercache.pipeline.records.spec import CacheSpec
from teachercache.pipeline.stores.shard_format import (
    ABSENT,
    CHECKSUM_NBYTES,
    checksum,
    index_nbytes,
    parse_index,
)
from teachercache.pipeline.stores.tar_index import read_index, read_rows, tar_name

_MAX_CHUNK_NBYTES = 1 << 30  # a chunk is one row; larger ones are not ours
_NEAR_KEYS = 5
_NORMS = ("min", "mean", "max")


def shard_details(manifest: Manifest, shard: int) -> dict[str, Any]:
    """A shard's rows, and what each teacher holds of it. Raises `CacheError` for one that cannot exist."""
    spec = manifest.spec()
    if not 0 <= shard < spec.num_shards:
        raise _not_here("shard", shard, spec.num_shards)
    rows, samples = spec.shard_rows(shard), spec.shard_samples(shard)
    problems: Problems = []
    return {
        "shard": shard,
        "rows": [rows[0], rows[-1]],
        "samples": [samples[0], samples[-1]],
        "views": spec.shard_segment(shard).num_views,
        "teachers": {name: _shard_state(manifest, spec, name, shard) for name in spec.teachers_and_images},
        "quarantined": [
            entry.model_dump(mode="json")
            for entry in quarantined(manifest, problems)
            if entry.sample_index in samples
        ],
        "problems": problems,
    }


def row_details(manifest: Manifest, row: int) -> dict[str, Any]:
    """A row's sample and view, and what each teacher holds of it."""
    spec = manifest.spec()
    try:
        sample, view, line = (int(number) for number in RowIndex(spec.segments).locate(row))
    except IndexError:
        raise _not_here("row", row, spec.num_rows) from None
    shard, place = divmod(row, spec.rows_per_shard)
    problems: Problems = []
    return {
        "row": row,
        "shard": shard,
        "place": place,
        "view_index": view,
        "sample": _line(manifest.storage, SAMPLES_NAME, sample, problems) | {"sample_index": sample},
        "view": _line(manifest.storage, VIEWS_NAME, line, problems),
        "teachers": {name: _row_state(manifest, spec, name, shard, place) for name in spec.teachers},
        "problems": problems,
    }


def sample_details(manifest: Manifest, key: str) -> dict[str, Any]:
    """A sample by its key or the end of it, with the state of each of its rows."""
    spec = manifest.spec()
    sample = _find(manifest.storage, key)
    segments = [segment for segment in spec.segments if sample in range(*segment.samples)]
    held = [view for segment in segments for view in range(*segment.views)]
    rows = RowIndex(spec.segments).rows(sample, held).tolist()
    problems: Problems = []
    reasons = [entry.reason for entry in quarantined(manifest, problems) if entry.sample_index == sample]
    return {
        "sample": _line(manifest.storage, SAMPLES_NAME, sample, problems) | {"sample_index": sample},
        "rows": [
            {
                "row": row,
                "view_index": view,
                "shard": row // spec.rows_per_shard,
                "teachers": {
                    name: _row_state(manifest, spec, name, *divmod(row, spec.rows_per_shard))["state"]
                    for name in spec.teachers
                },
            }
            for row, view in zip(rows, held, strict=True)
        ],
        "quarantined": reasons[0] if reasons else None,
        "problems": problems,
    }


def _shard_state(manifest: Manifest, spec: CacheSpec, teacher: str, shard: int) -> dict[str, Any]:
    record = _record(manifest, teacher, shard)
    if not isinstance(record, CommitRecord):
        return {"state": record}
    mismatch = record.mismatch(spec)
    problems = [mismatch] if mismatch else file_problems(manifest.storage.size, record)
    problems = problems or _exchanged(manifest, record)
    return {
        "state": f"broken: {problems[0]}" if problems else "committed",
        "nbytes": record.nbytes,
        "channels": None if problems else _channels(manifest.storage, record),
        **record.model_dump(mode="json", exclude={"teacher", "shard", "members"}),
    }


def _channels(storage: Storage, record: CommitRecord) -> list[dict[str, float]] | str | None:
    """The shard's statistics, by level: the spread (standard deviation) of channels, and dead ones.

    None where the shard was computed without, and why where they cannot be read.
    """
    name = next((name for name in record.files if name.startswith("stats/")), None)
    if name is None:
        return None
    try:
        data = storage.read_range(name, 0, _MAX_CHUNK_NBYTES)
        if xxhash.xxh3_128_hexdigest(data) != record.files[name].checksum:
            raise ValueError(f"{name} is not what its commit record says")
        moments = safetensors.numpy.load(data)
        spread_SC = np.sqrt(moments["squares"] / max(int(moments["count"]), 1))
        mean_SC = moments["mean"]
        return [
            {
                "mean": float(mean_C.mean()),
                "spread_min": float(spread_C.min()),
                "spread_median": float(np.median(spread_C)),
                "spread_max": float(spread_C.max()),
                "dead": int((spread_C == 0).sum()),
            }
            for mean_C, spread_C in zip(mean_SC, spread_SC, strict=True)
        ]
    except (CacheError, OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        return f"broken: {describe(error)}"


def _row_state(manifest: Manifest, spec: CacheSpec, teacher: str, shard: int, place: int) -> dict[str, Any]:
    record = _record(manifest, teacher, shard)
    if not isinstance(record, CommitRecord):
        return {"state": record}
    if shard * spec.rows_per_shard + place in record.invalid_rows:
        return {"state": "invalid: its image could not be decoded"}
    try:
        if problems := _exchanged(manifest, record):
            raise ValueError(problems[0])
        metadata = array_metadata(manifest.storage, spec, teacher)
        if spec.store == "webdataset":
            arrays = _tar_row(manifest.storage, spec, teacher, shard, place, metadata)
        else:
            arrays = {
                name: _chunk(manifest.storage, spec, record, f"teachers/{teacher}/{name}/", array, place)
                for name, array in metadata.items()
            }
    except (CacheError, OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        return {"state": f"broken: {describe(error)}"}
    return {
        "state": "sound",
        "arrays": {
            name: {"dtype": values.dtype.name, "shape": list(values.shape), "nbytes": values.nbytes}
            for name, values in arrays.items()
        },
        "token_norms": _token_norms(arrays["codes"]) if "codes" in arrays else None,
    }


def _exchanged(manifest: Manifest, record: CommitRecord) -> Problems:
    return [f"{name} is not the file that was committed" for name in manifest.exchanged([record])]


def _record(manifest: Manifest, teacher: str, shard: int) -> CommitRecord | str:
    try:
        return manifest.read_commit(teacher, shard)
    except FileNotFoundError:
        return "not committed"
    except (CacheError, OSError) as error:
        return f"broken: {describe(error)}"


def _chunk(
    storage: Storage,
    spec: CacheSpec,
    record: CommitRecord,
    folder: str,
    metadata: Mapping[str, Any],
    place: int,
) -> NDArray:
    """One row of one array, its checksum compared. Raises `ValueError` where it is not what it should be."""
    file = next((name for name in record.files if name.startswith(folder)), None)
    file_nbytes = storage.size(file) if file else None
    if file is None or file_nbytes is None:
        raise ValueError(f"the shard's file in {folder} is missing")
    end_nbytes = min(index_nbytes(spec.rows_per_shard), file_nbytes)
    end = storage.read_range(file, file_nbytes - end_nbytes, end_nbytes)
    offset, nbytes = parse_index(end, spec.rows_per_shard, file_nbytes)[place].tolist()
    dtype, shape = np.dtype(metadata["data_type"]), tuple(metadata["shape"][1:])
    expected = math.prod(shape) * dtype.itemsize + CHECKSUM_NBYTES
    if offset == ABSENT:
        raise ValueError(f"{file} holds no chunk for this row")
    if nbytes != expected or nbytes > _MAX_CHUNK_NBYTES:
        raise ValueError(f"{file} holds {nbytes:,} bytes for this row, expected {expected:,}")
    data = storage.read_range(file, offset, nbytes)
    if checksum(data[:-CHECKSUM_NBYTES]) != data[-CHECKSUM_NBYTES:]:
        raise ValueError(f"{file}: the checksum of this row is wrong")
    return _as_float(np.frombuffer(data[:-CHECKSUM_NBYTES], dtype.newbyteorder("<")).reshape(shape), metadata)


def _tar_row(
    storage: Storage,
    spec: CacheSpec,
    teacher: str,
    shard: int,
    place: int,
    metadata: Mapping[str, Mapping[str, Any]],
) -> dict[str, NDArray]:
    """One row of a tar, its checksum compared."""
    name = tar_name(teacher, shard)
    (row,) = read_rows(storage, [name], [read_index(storage, name, spec.rows_per_shard)], [place])
    arrays = safetensors.numpy.load(row)
    return {array: _as_float(arrays[array], metadata[array]) for array in metadata}


def _as_float(values: NDArray, metadata: Mapping[str, Any]) -> NDArray:
    if metadata.get("attributes", {}).get("bits_of") == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values


def _token_norms(codes_SHWC: NDArray) -> list[dict[str, float | None]] | None:
    """Of each level of float features: least, mean and largest norm of a token, and values not finite."""
    if codes_SHWC.dtype.kind != "f":
        return None
    levels: list[dict[str, float | None]] = []
    for tokens_HWC in codes_SHWC.astype(np.float32):
        norms_HW = np.linalg.norm(tokens_HWC, axis=-1)
        finite = norms_HW[np.isfinite(norms_HW)]
        norms = {name: float(getattr(finite, name)()) if finite.size else None for name in _NORMS}
        levels.append(norms | {"not_finite": int((~np.isfinite(tokens_HWC)).sum())})
    return levels


def _find(storage: Storage, key: str) -> int:
    """The index of the sample whose key is `key`, or the only one that ends in it: behind a slash, or else
    anywhere. Raises `CacheError`."""
    keys = _keys(storage)
    index: int = pc.index(keys, key).as_py()
    if index >= 0:
        return index
    for end in (f"/{key}", key):
        found = np.flatnonzero(pc.ends_with(keys, end).to_numpy())
        if len(found) == 1:
            return int(found[0])
        if found.size:
            break
    near = found if found.size else np.flatnonzero(pc.match_substring(keys, key).to_numpy())
    shown = ", ".join(keys[int(index)].as_py() for index in near[:_NEAR_KEYS])
    raise CacheError(
        f"{len(found)} samples have keys that end so." if found.size else "No sample has this key.",
        got=key,
        expected=f"one of {shown}, …" if shown else "a key of samples.parquet, or the end of one",
        do="give the whole key",
    )


def _line(storage: Storage, name: str, index: int, problems: Problems) -> dict[str, Any]:
    """One line of a table; nothing, and a problem, where it cannot be read."""
    try:
        with storage.open_read(name) as file:
            table = pq.ParquetFile(file)
            group = 0
            while index >= (lines := table.metadata.row_group(group).num_rows):
                index, group = index - lines, group + 1
            line: dict[str, Any] = table.read_row_group(group).slice(index, 1).to_pylist()[0]
    except (OSError, IndexError, RuntimeError, pa.ArrowException) as error:
        problems.append(f"{name} cannot be read: {describe(error)}")
        return {}
    return line


def _keys(storage: Storage) -> pa.ChunkedArray:
    try:
        return pq.read_table(pa.BufferReader(storage.read(SAMPLES_NAME)), columns=["key"])["key"]
    except (OSError, KeyError, pa.ArrowException) as error:
        raise CacheError(
            f"{SAMPLES_NAME} of this cache cannot be read, so no key can be looked up.",
            got=describe(error),
            expected="the table that the build wrote before any shard",
            do="restore it from a copy",
        ) from error


def _not_here(what: str, number: int, count: int) -> CacheError:
    return CacheError(
        f"This cache has no {what} {number}.",
        got=number,
        expected=f"0 … {count - 1}" if count else f"a cache that holds a {what}",
        do="see `teachercache inspect CACHE` for what there is",
    )
