"""Make a cache of some samples, teachers and levels of another."""

import difflib
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import safetensors.torch
import xxhash

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.codecs.normalisation import LEVEL_TABLES
from teachercache.pipeline.errors import CacheError
from teachercache.pipeline.loading.sampler import random_samples
from teachercache.pipeline.rearranging.new_shards import packed_shards, whole_shards
from teachercache.pipeline.rearranging.rearrangement import Rearrangement, dataset_of, lay_out, with_samples
from teachercache.pipeline.records.rows import Ints, divide_views
from teachercache.pipeline.records.spec import Segment, TeacherSpec
from teachercache.pipeline.records.tables import views_hash


def subset(
    url: str,
    out: str,
    *,
    keys: Iterable[str] | None = None,
    fraction: float | None = None,
    seed: int = 0,
    teachers: Sequence[str] | None = None,
    levels: Sequence[int] | None = None,
) -> Rearrangement:
    """A cache of some samples (those of `keys`, or a random `fraction`), teachers and levels of another.

    A smaller fraction with the same seed is a subset of a larger one. `levels` are counted from 0, or from
    the end as -1. Without a choice of samples or levels, shards stay as they are; otherwise their rows are
    packed into new ones. A shard whose rows are not all committed in the cache is left out; run the same
    command again once they are. Raises `CacheError` for what the cache does not hold.
    """
    source = FeatureCache.open(url, checksums=True)
    names = source.check_teachers(teachers)
    kept = {name: source.spec.teachers[name] for name in names}
    fidelity = {name: value for name, value in source.spec.fidelity.items() if name in kept}
    tables = dict[str, bytes]()
    if levels is not None:
        fidelity = {}  # it is of all levels together
        for name in names:
            kept[name], tables[name] = _of_levels(source, name, levels)
    if keys is None and fraction is None and levels is None:
        spec = source.spec.changed(teachers=kept, fidelity=fidelity)
        target = lay_out(out, spec, [source], source.samples, source.manifest.views(source.spec))
        return Rearrangement(target.storage.url, whole_shards(source, target))
    chosen = _chosen(source, keys, fraction, seed)
    samples = source.samples.take(pa.array(chosen))
    dataset = dataset_of([source], samples)
    segments, views = list[Segment](), list[pa.Table]()
    all_lines, per_shard = source.manifest.views(source.spec), source.spec.rows_per_shard
    stated, first_row = all(segment.views_hash for segment in source.spec.segments), 0
    for part in divide_views((0, source.num_views), per_shard):
        rows = source.index.rows(chosen[:, None], np.arange(*part)[None])
        lines = all_lines.take(pa.array(source.index.locate(rows.ravel())[2]))
        views.append(with_samples(lines, np.repeat(np.arange(len(chosen)), rows.shape[1])))
        segments.append(
            Segment(
                first_row=first_row,
                samples=(0, len(chosen)),
                views=part,
                fingerprint=dataset.fingerprint,
                views_hash=views_hash(views[-1], 0) if stated else None,
            )
        )
        first_row += -(-rows.size // per_shard) * per_shard
    spec = source.spec.changed(dataset=dataset, segments=tuple(segments), teachers=kept, fidelity=fidelity)
    target = lay_out(out, spec, [source], samples, pa.concat_tables(views), tables)
    return Rearrangement(target.storage.url, list(packed_shards(source, target, chosen)))


def _of_levels(source: FeatureCache, name: str, levels: Sequence[int]) -> tuple[TeacherSpec, bytes]:
    """A teacher with these levels alone, and its codec's tables for them (empty if it has none)."""
    spec, features = source.spec.teachers[name], source.features[name]
    single = range(-spec.num_levels, spec.num_levels)
    if any(layout.axes[0] != "level" for layout in features.feature_layouts.values()):
        single = range(0)
    if not levels or not {*levels} <= {*single}:
        raise CacheError(
            f"Teacher {name} cannot be stored with these levels alone.",
            got=", ".join(map(str, levels)) or "none",
            expected=f"some of 0…{spec.num_levels - 1}"
            if single
            else f"all: {spec.codec} codes them together",
            do="choose other levels, or take all levels of this teacher",
        )
    numbers = sorted({level % spec.num_levels for level in levels})
    changes: dict[str, object] = {"block_indices": tuple(spec.block_indices[number] for number in numbers)}
    data = b""
    if tables := features.codec.state():
        tables |= {table: tables[table][numbers] for table in LEVEL_TABLES if table in tables}
        data = safetensors.torch.save(tables)
        changes["tables_hash"] = xxhash.xxh3_128_hexdigest(data)
    return spec.model_copy(update=changes), data


def _chosen(source: FeatureCache, keys: Iterable[str] | None, fraction: float | None, seed: int) -> Ints:
    """Ascending indices of the samples to keep."""
    if keys is not None and fraction is not None:
        raise CacheError("A subset is chosen by keys or by a fraction, not by both.", do="give one of them")
    if keys is not None:
        distinct_keys = pa.array(sorted(set(keys)), pa.string())
        places = pc.index_in(distinct_keys, value_set=source.samples["key"])
        if places.null_count:
            unknown = distinct_keys.filter(pc.is_null(places)).to_pylist()
            near = difflib.get_close_matches(unknown[0], source.samples["key"].to_pylist(), 1)
            raise CacheError(
                f"{len(unknown)} of {len(distinct_keys)} keys are not in this cache.",
                got=", ".join(unknown[:3]),
                expected=f"keys of {source.storage.url}/samples.parquet",
                do=f"did you mean {near[0]}?" if near else "give whole keys, one per line",
            )
        chosen = np.sort(places.to_numpy())
    elif fraction is not None:
        chosen = random_samples(source.num_samples, fraction if 0 < fraction <= 1 else 0, seed)
    else:
        chosen = np.arange(source.num_samples)
    if not chosen.size:
        raise CacheError(
            "This subset would be empty.",
            got="no key" if keys is not None else f"a fraction of {fraction} of {source.num_samples} samples",
            expected="at least one sample",
            do="give more keys, or a larger fraction, up to 1",
        )
    return chosen.astype(np.int64)
