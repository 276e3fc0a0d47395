"""One shard, one row or one sample of a cache, as plain data. No torch here, as in `summary.py`.

Rows are read as training reads them, their checksums compared; float features give norms.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from teachercache.pipeline.errors import CacheError, in_a_line
from teachercache.pipeline.places.storage import Storage
from teachercache.pipeline.records.integrity import Checked, Depth, check_shards, file_problems, quarantine
from teachercache.pipeline.records.manifest import SAMPLES_NAME, VIEWS_NAME, CommitRecord, Manifest
from teachercache.pipeline.records.rows import RowIndex
from teachercache.pipeline.records.spec import CacheSpec
from teachercache.pipeline.records.tables import find_key, table_line
from teachercache.pipeline.stores.committed_shards import CommittedShards
from teachercache.pipeline.stores.open_store import open_store

_NORMS = ("min", "mean", "max")


def shard_details(manifest: Manifest, shard: int) -> dict[str, Any]:
    """A shard's rows, and what each teacher holds of it. Raises `CacheError` for one that cannot exist."""
    spec = manifest.spec()
    _require("shard", shard, spec.num_shards)
    rows, samples = spec.shard_rows(shard), spec.shard_samples(shard)
    entries, unreadable = quarantine(manifest)
    return {
        "shard": shard,
        "rows": [rows[0], rows[-1]],
        "samples": [samples[0], samples[-1]],
        "views": spec.shard_segment(shard).num_views,
        "teachers": {name: {"state": "not committed"} for name in spec.teachers_and_images}
        | {
            checked.teacher: _shard_state(manifest.storage, checked)
            for checked in check_shards(manifest, spec, Depth.ENDS, [shard])
        },
        "quarantined": [entry.model_dump(mode="json") for entry in entries if entry.sample_index in samples],
        "problems": [problem.reason for problem in unreadable],
    }


def row_details(manifest: Manifest, row: int) -> dict[str, Any]:
    """A row's sample and view, and what each teacher holds of it."""
    spec = manifest.spec()
    _require("row", row, spec.num_rows)
    sample, view, line = (int(number) for number in RowIndex(spec.segments).locate(row))
    shard, place = divmod(row, spec.rows_per_shard)
    problems: list[str] = []
    return {
        "row": row,
        "shard": shard,
        "place": place,
        "view_index": view,
        "sample": _line(manifest.storage, SAMPLES_NAME, sample, problems) | {"sample_index": sample},
        "view": _line(manifest.storage, VIEWS_NAME, line, problems),
        "teachers": {shards.teacher: _row_state(shards, row) for shards in _committed(manifest, spec)},
        "problems": problems,
    }


def sample_details(manifest: Manifest, key: str) -> dict[str, Any]:
    """A sample by its key or the end of it, with the state of each of its rows."""
    spec = manifest.spec()
    sample = find_key(manifest.samples(spec)["key"], key)
    segments = [segment for segment in spec.segments if sample in range(*segment.samples)]
    held = [view for segment in segments for view in range(*segment.views)]
    rows = RowIndex(spec.segments).rows(sample, held).tolist()
    entries, unreadable = quarantine(manifest)
    problems = [problem.reason for problem in unreadable]
    reasons = [entry.reason for entry in entries if entry.sample_index == sample]
    committed = _committed(manifest, spec)
    return {
        "sample": _line(manifest.storage, SAMPLES_NAME, sample, problems) | {"sample_index": sample},
        "rows": [
            {
                "row": row,
                "view_index": view,
                "shard": row // spec.rows_per_shard,
                "teachers": {shards.teacher: _row_state(shards, row)["state"] for shards in committed},
            }
            for row, view in zip(rows, held, strict=True)
        ],
        "quarantined": reasons[0] if reasons else None,
        "problems": problems,
    }


def _committed(manifest: Manifest, spec: CacheSpec) -> list[CommittedShards]:
    """What each teacher has."""
    store = open_store(manifest.storage, spec, checksums=True)
    return [CommittedShards(store, name) for name in spec.teachers]


def _shard_state(storage: Storage, checked: Checked) -> dict[str, Any]:
    record, problems = checked.record, checked.problems
    state = f"broken: {problems[0].reason}" if problems else "committed"
    if record is None:
        return {"state": state}
    return {
        "state": state,
        "nbytes": record.nbytes,
        "channels": None if problems else _channels(storage, record),
        **record.model_dump(mode="json", exclude={"teacher", "shard", "members"}),
    }


def _channels(storage: Storage, record: CommitRecord) -> list[dict[str, float]] | str | None:
    """The shard's statistics, by level: the spread (standard deviation) of channels, and dead ones.

    None where the shard was computed without, and why where they cannot be read.
    """
    files = {name: file for name, file in record.files.items() if name.startswith("stats/")}
    if not files:
        return None
    if problems := file_problems(storage, record.model_copy(update={"files": files}), Depth.BYTES):
        return f"broken: {problems[0].reason}"
    try:
        moments = safetensors.numpy.load(storage.read(*files))
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
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        return f"broken: {in_a_line(error)}"


def _row_state(shards: CommittedShards, row: int) -> dict[str, Any]:
    """Whether a teacher's row can be read, and what is in it."""
    rows = np.array([row])
    try:
        if not shards.readable(rows)[0]:
            is_committed = shards.mask[row // shards.store.spec.rows_per_shard]
            return {"state": "invalid: its image could not be decoded" if is_committed else "not committed"}
        layouts = shards.store.stored_layouts(shards.teacher)
        arrays = {name: layout.empty(1) for name, layout in layouts.items()}
        shards.read(rows, arrays)
    except (CacheError, OSError) as error:
        return {"state": f"broken: {in_a_line(error)}"}
    described: dict[str, dict[str, Any]] = {
        name: {
            "dtype": str(layout.attributes.get("bits_of", layout.dtype.name)),
            "shape": list(layout.shape),
            "nbytes": layout.row_nbytes,
        }
        for name, layout in layouts.items()
    }
    norms = _token_norms(arrays["codes"][0], described["codes"]["dtype"]) if "codes" in arrays else None
    return {"state": "sound", "arrays": described, "token_norms": norms}


def _token_norms(codes_SHWC: NDArray, dtype: str) -> list[dict[str, float | None]] | None:
    """Of each level of float features: least, mean and largest norm of a token, and values not finite."""
    if dtype == "bfloat16":
        codes_SHWC = (codes_SHWC.astype(np.uint32) << 16).view(np.float32)
    if codes_SHWC.dtype.kind != "f":
        return None
    levels: list[dict[str, float | None]] = []
    for tokens_HWC in codes_SHWC.astype(np.float32):
        norms_HW = np.linalg.norm(tokens_HWC, axis=-1)
        finite = norms_HW[np.isfinite(norms_HW)]
        norms = {name: float(getattr(finite, name)()) if finite.size else None for name in _NORMS}
        levels.append(norms | {"not_finite": int((~np.isfinite(tokens_HWC)).sum())})
    return levels


def _line(storage: Storage, name: str, index: int, problems: list[str]) -> dict[str, Any]:
    """One line of a table; nothing, and a problem, where it cannot be read."""
    try:
        with storage.open_read(name) as file:
            return table_line(file, index)
    except (OSError, IndexError, RuntimeError, pa.ArrowException) as error:
        problems.append(f"{name} cannot be read: {in_a_line(error)}")
        return {}


def _require(what: str, number: int, count: int) -> None:
    if not 0 <= number < count:
        raise CacheError(
            f"This cache has no {what} {number}.",
            got=number,
            expected=f"0 … {count - 1}" if count else f"a cache that holds a {what}",
            do="see `teachercache inspect CACHE` for what there is",
        )
