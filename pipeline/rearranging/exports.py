"""Export a cache in the form that other programs read: docs/cache_format.md has the files and columns.

Theia's training code reads tars, in the layout of github.com/bdaiinstitute/theia, `doc/dataset_format.md` and
`theia/dataset/data_utils.py`. Its loader zips the columns, so all tars hold the same samples in one order.
Parquet and Lance get a line for each view.
"""

import io
import json
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
import xxhash
from torch import Tensor

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import CacheError, CacheMismatchError, extra
from teachercache.pipeline.grids import mean_token
from teachercache.pipeline.places.open_storage import open_storage
from teachercache.pipeline.places.storage import Storage, room_at
from teachercache.pipeline.records.rows import Ints
from teachercache.pipeline.stores.feature_store import CLS_TOKEN

_MEMBERS_AT_ONCE, _LINES_AT_ONCE = 16, 256
_SPLITS = ("train", "val", "test")


def export_lines(cache: FeatureCache, out: str, form: Literal["parquet", "lance"], level: int = -1) -> int:
    """Write a line for each view, all or none; returns their number. Raises `MissingExtraError` without
    pylance, and `CacheError` for a level that is not stored."""
    rows = _rows(cache, level)
    starts = range(0, len(rows), _LINES_AT_ONCE)
    parts = (_lines(cache, rows[at : at + _LINES_AT_ONCE], level) for at in starts)
    schema = _lines(cache, rows[:1], level).schema
    if form == "parquet":
        folder, name = posixpath.split(out)
        with open_storage(folder or ".").open_write(name) as file, pq.ParquetWriter(file, schema) as writer:
            for part in parts:
                writer.write_batch(part)
        return len(rows)
    with extra("lance"):
        import lance
    lance.write_dataset(parts, out, schema=schema)
    return len(rows)


def export_theia(
    cache: FeatureCache,
    out: str,
    *,
    dataset: str = "imagenet",
    split: str = "train",
    level: int = -1,
    samples_per_shard: int = 1000,
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Write a split for Theia; returns its number of samples. Existing tars are kept: they are complete.

    `level` counts the stored levels of each teacher, -1 is the last. `progress` is called with the number
    of samples of each finished column of a tar. Raises `CacheError` for a level that is not stored and for
    keys that `webdataset` would cut, `CacheMismatchError` where there is another export of this split.
    """
    with extra("train"):
        from webdataset.writer import TarWriter
    rows = _rows(cache, level)
    if split not in _SPLITS:
        raise CacheError("There is no such split.", got=split, expected=", ".join(_SPLITS))
    storage = open_storage(out)
    open_storage(f"{storage.url}/{dataset}").sweep()
    keys = _keys(cache, rows)
    with room_at(storage.url):
        made_from = {
            "cache_id": cache.spec.cache_id,
            "levels": {name: level % teacher.num_levels for name, teacher in cache.spec.teachers.items()},
            "samples_per_shard": samples_per_shard,
            "samples": len(keys),
            "keys": xxhash.xxh3_128_hexdigest("\n".join(keys).encode()),
        }
        _claim(storage, dataset, f"{dataset}_{split}", made_from)
        for shard, start in enumerate(range(0, len(rows), samples_per_shard)):
            part = slice(start, start + samples_per_shard)
            file = f"{dataset}_{split}-{shard:06d}-{split}.tar"
            columns: dict[str, Iterator[bytes]] = {"images": _images(cache, rows[part])}
            columns |= {name: _features(cache, name, rows[part], level) for name in cache.teachers}
            for column, members in columns.items():
                suffix = "image" if column == "images" else f"{column}.safetensors"
                name = f"{dataset}/{column}/{file}"
                if not storage.exists(name):
                    with (
                        storage.open_write(name) as whole,
                        TarWriter(whole, encoder=False, mtime=0, format="PAX_FORMAT") as tar,
                    ):
                        for key, data in zip(keys[part], members, strict=True):
                            tar.write({"__key__": key, suffix: data})
                progress(len(rows[part]))
        name = f"{dataset}/splits.json"  # where others' splits stay: validation images are another cache
        known = json.loads(storage.read(name)) if storage.exists(name) else {}
        splits = {one: known.get(one, 0) for one in _SPLITS} | {split: len(rows)}
        storage.write(name, (json.dumps(splits, indent=2) + "\n").encode())
    return len(rows)


def _rows(cache: FeatureCache, level: int) -> Ints:
    """All views of the samples that every teacher holds. Raises `CacheError` unless all store this level."""
    for name, teacher in cache.spec.teachers.items():
        if not -teacher.num_levels <= level < teacher.num_levels:
            raise CacheError(
                f"Teacher {name} cannot be exported.",
                got=f"level {level} of {teacher.num_levels}",
                expected="a level that is stored",
                do="choose another --level",
            )
    return cache.index.rows(cache.valid_samples()[:, None], np.arange(cache.num_views)).ravel()


def _claim(storage: Storage, folder: str, stem: str, made_from: dict[str, Any]) -> None:
    """Record what a split is made from. Raises `CacheMismatchError` if it was made from something else."""
    name, data = f"{folder}/{stem}.json", (json.dumps(made_from, indent=2) + "\n").encode()
    columns = ("images", *made_from["levels"])
    existing = data
    if storage.exists(name):
        existing = storage.read(name)
    elif any(tar.startswith(stem) for column in columns for tar in storage.names(f"{folder}/{column}")):
        existing = b"tars without that file"
    if existing != data:
        raise CacheMismatchError(
            f"Another export is at {storage.url}/{folder}.",
            got=f"{name}: {' '.join(existing.decode(errors='replace').split())}",
            expected=f"nothing, or the beginning of this very export: {json.dumps(made_from)}",
            do="choose another place (-o …), another --split or another --dataset",
        )
    storage.write(name, data)


def _keys(cache: FeatureCache, rows: Ints) -> list[str]:
    """A key for each row, without the dots and slashes where loaders cut keys."""
    samples, views, _ = cache.index.locate(rows)
    plain = [cache.key(sample).replace(".", "_").replace("/", "_") for sample in samples.tolist()]
    keys = [f"{key}_v{view}" if cache.num_views > 1 else key for key, view in zip(plain, views, strict=True)]
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise CacheError(
            "Some keys of this cache become equal without their dots and slashes.",
            got=", ".join(twice[:3]),
            expected="keys that differ in other characters too",
            do="rename the images, or export a subset",
        )
    return keys


def _images(cache: FeatureCache, rows: Ints) -> Iterator[bytes]:
    for row in rows.tolist():
        pixels = cache.pixels(row)[0].permute(1, 2, 0).numpy()
        file = io.BytesIO()
        np.save(file, np.ascontiguousarray(pixels), allow_pickle=False)
        yield file.getvalue()


def _features(cache: FeatureCache, name: str, rows: Ints, level: int) -> Iterator[bytes]:
    for start in range(0, len(rows), _MEMBERS_AT_ONCE):
        batch = rows[start : start + _MEMBERS_AT_ONCE]
        for shard in np.unique(batch // cache.spec.rows_per_shard).tolist():
            cache.shards[name].require_sound(shard)
        maps_RCHW = cache.read(batch, [name])[name].decode()[:, level].permute(0, 3, 1, 2)
        tensors = {"embedding": maps_RCHW.to(torch.bfloat16)}
        if CLS_TOKEN in cache.layouts(name):
            tensors["cls_token"] = cache.read_tokens(batch, name, CLS_TOKEN)[:, level].to(torch.bfloat16)
        for place in range(len(batch)):
            yield safetensors.torch.save({key: value[place].contiguous() for key, value in tensors.items()})


def _lines(cache: FeatureCache, rows: Ints, level: int) -> pa.RecordBatch:
    samples, views, _ = cache.index.locate(rows)
    key, label = (cache.samples[name].take(samples).combine_chunks() for name in ("key", "label"))
    columns = {"key": key, "view": pa.array(views, pa.int32()), "row": pa.array(rows), "label": label}
    for name, encoded in cache.read(rows).items():
        spec = cache.spec.teachers[name]
        columns[f"mean_{name}"] = _vectors(mean_token(encoded.decode()[:, level].flatten(1, 2), spec))
        if spec.cls_token:
            columns[f"cls_{name}"] = _vectors(cache.read_tokens(rows, name, CLS_TOKEN)[:, level])
    return pa.RecordBatch.from_pydict(columns)


def _vectors(values_BC: Tensor) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(values_BC.float().numpy().ravel(), values_BC.shape[1])
