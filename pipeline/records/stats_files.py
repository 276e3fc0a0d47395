"""The files in `stats/`: the tables that codecs decode with, and the moments of every shard's features."""

from collections.abc import Iterable

import safetensors.torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor

from teachercache.pipeline.errors import CacheError
from teachercache.pipeline.places.storage import Storage
from teachercache.pipeline.records.feature_stats import FeatureMoments
from teachercache.pipeline.records.manifest import (
    FileRecord,
    Manifest,
    foreign_tables,
    moments_name,
    tables_name,
)


def write_tables(storage: Storage, teacher: str, tables: dict[str, Tensor]) -> str:
    """Store a codec's calibrated tables; returns their hash, for the teacher's spec."""
    data = safetensors.torch.save(tables)
    storage.write(tables_name(teacher), data)
    return xxhash.xxh3_128_hexdigest(data)


def read_tables(manifest: Manifest, teacher: str, tables_hash: str | None) -> dict[str, Tensor]:
    """A codec's tables. Raises `CacheError` unless they are those of the spec."""
    data = manifest.codec_tables(teacher, tables_hash)
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise foreign_tables(teacher, f"{type(error).__name__}: {error}", "safetensors") from error


def write_moments(
    storage: Storage, teacher: str, shard: int, moments: FeatureMoments
) -> dict[str, FileRecord]:
    """Store the statistics of a shard's features; its commit record shall name the returned file."""
    name = moments_name(teacher, shard)
    with storage.open_write(name) as file:
        file.write(safetensors.torch.save(moments.to("cpu").tensors()))
    return {name: FileRecord.of(file)}


def merged_moments(
    manifest: Manifest, teacher: str, shards: Iterable[int], shape: tuple[int, int]
) -> FeatureMoments:
    """The statistics of these shards together, merged in their order: the same bits every time.

    `shape` is (levels, channels). Shards without a valid row have none. Raises `CacheError` where other
    shards have none, or a file that holds something else.
    """
    storage, total = manifest.storage, None
    for record in manifest.commits(teacher, shards).values():
        names = [name for name in record.files if name.startswith("stats/")]
        if not names and len(record.invalid_rows) == record.num_rows:
            continue
        try:
            if not names:
                raise ValueError("a shard that was computed without statistics")
            data = storage.read(names[0])
            if xxhash.xxh3_128_hexdigest(data) != record.files[names[0]].checksum:
                raise ValueError("the file is damaged")
            moments = FeatureMoments.from_tensors(safetensors.torch.load(data))
            if tuple(moments.mean_SC.shape) != shape:
                raise ValueError(f"moments of (levels, channels) {tuple(moments.mean_SC.shape)}")
        except (FileNotFoundError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
            compute_again = "compute the cache again with this version, if you need them"
            raise CacheError(
                f"Shard {record.shard} of {teacher} has no usable statistics.",
                got=f"{type(error).__name__}: {error}",
                expected=f"{moments_name(teacher, record.shard)} with those of (levels, channels) {shape}",
                do=f"run: teachercache repair {storage.url}" if names else compute_again,
            ) from error
        total = moments if total is None else total.merge(moments)
    if total is None:
        raise CacheError(f"There are no statistics of {teacher}: none of its rows is committed.")
    return total
