"""Small complete caches for tests: real images, real files, random features, no teacher."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from teachercache.cache_builder.build_recipe import BuildRecipe
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.codecs import torch_dtype
from teachercache.pipeline.places.open_storage import open_storage
from teachercache.pipeline.records.manifest import CommitRecord, Manifest
from teachercache.pipeline.records.spec import (
    CacheSpec,
    Compressor,
    DatasetSpec,
    GridSpec,
    Segment,
    StoreKind,
    TeacherSpec,
)
from teachercache.pipeline.records.tables import dataset_fingerprint, labels_hash, with_views_hashes
from teachercache.pipeline.records.view_policy import Flip, PolicyName, ViewPolicy
from teachercache.pipeline.sources import open_source
from teachercache.pipeline.stores.feature_store import teacher_layouts
from teachercache.pipeline.views import draw_views


def make_images(folder: Path, count: int, size: tuple[int, int] = (64, 48), seed: int = 0) -> Path:
    """`count` smooth colourful JPEGs (width, height), different from each other."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for i in range(count):
        coarse = generator.integers(0, 256, (4, 5, 3), np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(
            folder / f"image_{i:03d}.jpg", quality=90
        )
    return folder


def teacher_spec(width: int = 8, grid: int = 2, codec: str = "f32", cls_token: bool = False) -> TeacherSpec:
    return TeacherSpec(
        model="none",
        pretrained=False,
        weights_hash="0" * 32,
        image_size=(32, 32),
        render_size=(32, 32),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        block_indices=(0, 1, 2, 3),
        native_grid=(grid, grid),
        width=width,
        grid=GridSpec(),
        codec=codec,
        cls_token=cls_token,
    )


def features(spec: CacheSpec, teacher: str) -> dict[str, torch.Tensor]:
    """What every row of a made cache holds: the same numbers at every call."""
    generator = torch.Generator().manual_seed(len(teacher))
    rows = spec.num_shards * spec.rows_per_shard
    arrays = {}
    for name, layout in teacher_layouts(spec.teachers[teacher]).items():
        values = torch.randn((rows, *layout.shape), generator=generator)
        arrays[name] = (
            values.to(torch.bfloat16).view(torch.uint16)
            if layout.dtype == np.uint16
            else values.to(torch_dtype(layout.dtype))
        )
    return arrays


def make_cache(
    path: str | Path,
    images: Path | str,
    *,
    kind: str = "auto",
    teachers: dict[str, TeacherSpec] | None = None,
    num_views: int = 2,
    samples_per_shard: int = 3,
    view_size: tuple[int, int] = (32, 32),
    policy: PolicyName = "imagenet_train",
    flip: Flip = "random",
    invalid_samples: Collection[int] = (),
    skip_shards: Collection[int] = (),
    store: StoreKind = "zarr",
    compressor: Compressor | None = None,
    hashes: bool = True,
) -> FeatureCache:
    """A cache over `images`, every shard committed except `skip_shards`, `invalid_samples` quarantined.

    Without `hashes` of its tables and of the ends of its files, as caches were once.
    """
    source = open_source(str(images), kind)
    samples = source.scan(workers=1, progress=None)
    view_policy = ViewPolicy(policy=policy, num_views=num_views, size=view_size, flip=flip)
    spec = CacheSpec(
        dataset=DatasetSpec(
            kind=source.kind,
            location=source.location,
            num_samples=samples.num_rows,
            fingerprint=dataset_fingerprint(samples),
            labels_hash=labels_hash(samples) if hashes else None,
        ),
        views=view_policy,
        rows_per_shard=samples_per_shard * num_views,
        store=store,
        compressor=compressor,
        segments=(Segment(first_row=0, samples=(0, samples.num_rows), views=(0, num_views)),),
        teachers=teachers or {"alpha": teacher_spec(), "beta": teacher_spec(width=4, grid=3, codec="f16")},
        created="2026-01-01T00:00:00+00:00",
        versions={},
    )
    storage = open_storage(path)
    views = draw_views(
        view_policy,
        samples["key"].to_pylist(),
        samples["width"].to_numpy(),
        samples["height"].to_numpy(),
        (0, num_views),
    )
    manifest = Manifest(storage)
    if hashes:
        spec = spec.changed(segments=with_views_hashes(spec, views))
    cache = FeatureCache(storage, spec)
    for teacher in spec.teachers:
        cache.store.create(teacher)
    cache.store.create(None)
    manifest.create(spec, samples, views)
    for teacher in spec.teachers:
        for shard in range(spec.num_shards):
            if shard not in skip_shards:
                commit_shard(cache, teacher, shard, invalid_samples, hashes=hashes)
    return FeatureCache.open(storage.url)


def commit_shard(
    cache: FeatureCache,
    teacher: str,
    shard: int,
    invalid_samples: Collection[int] = (),
    value: float | None = None,
    hashes: bool = True,
) -> None:
    """`value`: what the first channel of every first token holds (codec bf16)."""
    spec = cache.spec
    rows = spec.shard_rows(shard)
    owners = cache.index.locate(rows)[0]
    invalid = [row for row, owner in zip(rows, owners.tolist(), strict=True) if owner in invalid_samples]
    valid = [row for row in rows if row not in invalid]
    arrays = features(spec, teacher)
    if value is not None:
        arrays["codes"].view(torch.bfloat16)[:, 0, 0, 0, 0] = value
    with cache.store.write_shard(teacher, shard) as writer:
        writer.write(
            [row - rows.start for row in valid],
            {name: array[valid].numpy() for name, array in arrays.items()},
        )
        files = writer.publish()
    if not hashes:
        files = {name: file.model_copy(update={"ends": ""}) for name, file in files.items()}
    Manifest(cache.storage).commit(
        CommitRecord(
            teacher=teacher,
            shard=shard,
            content_id=spec.shard_content_id(teacher, shard),
            first_row=rows.start,
            num_rows=len(rows),
            invalid_rows=tuple(invalid),
            files=files,
            source_checksum="",
            seconds={},
            host="",
            versions={},
            finished="",
        )
    )


def build_recipe(cache: Path | str, source: Path | str | list[Any], **changes: object) -> BuildRecipe:
    """The recipe of a small real build: one tiny ViT, random weights."""
    content: dict[str, object] = {
        "cache": str(cache),
        "source": source if isinstance(source, list) else str(source),
        "teachers": {"tiny": {"model": "vit_tiny_patch16_224", "pretrained": False, "codec": "f32"}},
        "views": {"num_views": 2, "size": [32, 32]},
        "rows_per_shard": 6,
        "runner": {"batch_size": 4, "decode_threads": 2},
    }
    return BuildRecipe.model_validate(content | changes)
