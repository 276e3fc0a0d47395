"""`merge`, `subset`, `convert` and the export for Theia: the same rows elsewhere, and nothing decoded."""

from __future__ import annotations

import gc
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset
import xxhash
from rich.console import Console

from teachercache import FeatureCache, build, render_view
from teachercache.pipeline.codecs import get_codec
from teachercache.pipeline.errors import CacheError, CacheMismatchError, CorruptShardError
from teachercache.pipeline.rearranging.convert import convert
from teachercache.pipeline.rearranging.exports import export_theia
from teachercache.pipeline.rearranging.merge import merge
from teachercache.pipeline.rearranging.rearrangement import Rearrangement
from teachercache.pipeline.rearranging.subset import subset
from teachercache.pipeline.records.manifest import QuarantineEntry, tables_name
from teachercache.pipeline.records.spec import StoreKind
from teachercache.pipeline.sources.place import Place
from teachercache.pipeline.verify import strays, verify
from tests.images import write_folder
from tests.make_cache import build_recipe, features, make_cache, make_images, teacher_spec

QUIET = Console(quiet=True)
TEACHERS = {"t": teacher_spec(codec="f16", cls_token=True), "u": teacher_spec(width=4, grid=3, codec="bf16")}


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def parts(folder: Path, counts: tuple[int, ...] = (5, 4)) -> list[Path]:
    """Folders below one, with different images under different keys."""
    made = []
    for part, count in enumerate(counts):
        plain = make_images(folder / "plain" / str(part), count, seed=part)
        made.append(folder / f"part{part}")
        names = {f"p{part}_{path.name}": path.read_bytes() for path in plain.iterdir()}
        write_folder(made[-1], names)
    return made


def assert_sound(cache: FeatureCache) -> None:
    assert verify(cache, full=True) == []
    assert strays(cache) == []


def assert_rows_are(cache: FeatureCache, source: FeatureCache, samples: list[int], whole: list[int]) -> None:
    """Samples `samples` of `cache` have the features, tokens and views of `whole` in `source`."""
    for view in range(source.num_views):
        new, old = cache.index.rows(samples, view), source.index.rows(whole, view)
        for name in cache.teachers:
            for array, tensor in source.read(old, [name])[name].tensors().items():
                assert torch.equal(cache.read(new, [name])[name].tensors()[array], tensor)
        assert torch.equal(cache.read_tokens(new, "t", "cls"), source.read_tokens(old, "t", "cls"))
        for one, other in zip(new.tolist(), old.tolist(), strict=True):
            assert cache.view(one) == source.view(other)
    assert [cache.key(sample) for sample in samples] == [source.key(sample) for sample in whole]
    for sample, origin in zip(samples, whole, strict=True):
        assert cache.image_bytes(sample) == source.image_bytes(origin)


@pytest.fixture
def source(tmp_path: Path) -> FeatureCache:
    """8 samples, 2 views, 3 shards; sample 2 is quarantined."""
    cache = make_cache(
        tmp_path / "cache", make_images(tmp_path / "images", 8), teachers=TEACHERS, invalid_samples=[2]
    )
    entry = QuarantineEntry(sample_index=2, key="image_002", location="image_002.jpg", reason="cut")
    cache.manifest.write_quarantine(0, [entry])
    assert_sound(cache)
    return cache


def test_convert_there_and_back_gives_the_same_files(tmp_path: Path, source: FeatureCache) -> None:
    there = convert(source.storage.url, str(tmp_path / "tars"), "webdataset").run()
    assert_sound(there)
    assert there.spec.cache_id == source.spec.cache_id
    assert there.spec.store == "webdataset"
    valid = source.valid_samples().tolist()
    assert there.valid_samples().tolist() == valid
    assert_rows_are(there, source, valid, valid)
    convert(there.storage.url, str(tmp_path / "back"), "zarr").run()
    assert files(tmp_path / "back") == files(tmp_path / "cache")


def test_convert_continues_where_it_was_stopped(tmp_path: Path, source: FeatureCache) -> None:
    steps = convert(source.storage.url, str(tmp_path / "tars"), "webdataset").steps
    assert len(steps) == 6
    for step in steps[:4]:
        step.make()
    before = files(tmp_path / "tars")
    rest = convert(source.storage.url, str(tmp_path / "tars"), "webdataset")
    assert [(step.teacher, step.shard) for step in rest.steps] == [("u", 1), ("u", 2)]
    assert_sound(rest.run())
    assert before.items() <= files(tmp_path / "tars").items()


def test_convert_refuses_broken_rows_and_other_caches(tmp_path: Path, source: FeatureCache) -> None:
    with pytest.raises(CacheError, match="nothing to convert"):
        convert(source.storage.url, str(tmp_path / "out"), "zarr")
    make_cache(tmp_path / "other", make_images(tmp_path / "more", 3), store="webdataset")
    with pytest.raises(CacheMismatchError, match="Another cache is at this path"):
        convert(source.storage.url, str(tmp_path / "other"), "webdataset")
    name = source.store.shard_files("t", 1)[0]
    data = bytearray(source.storage.read(name))
    data[7] ^= 1
    source.storage.write(name, data)
    with pytest.raises(CorruptShardError, match="checksum"):
        convert(source.storage.url, str(tmp_path / "out"), "webdataset").run()
    assert not (tmp_path / "out" / "commits" / "t" / "00001.json").exists()


def test_a_webdataset_cache_is_built_and_converted(tmp_path: Path) -> None:
    """By the build itself, images copied, with an image that cannot be decoded."""
    images = make_images(tmp_path / "images", 5)
    (images / "image_001.jpg").write_bytes(b"no image")
    tars = build(build_recipe(tmp_path / "tars", images, store="webdataset", images="copy"), QUIET).cache
    zarr = build(build_recipe(tmp_path / "zarr", images, images="copy"), QUIET).cache
    assert tars.spec.cache_id == zarr.spec.cache_id
    assert_sound(tars)
    rows = tars.index.rows(tars.valid_samples(), 1)
    assert torch.equal(tars.read(rows)["tiny"].decode(), zarr.read(rows)["tiny"].decode())
    converted = convert(str(tmp_path / "zarr"), str(tmp_path / "converted"), "webdataset").run()
    assert_sound(converted)
    tar = "teachers/tiny/00000.tar"
    assert converted.storage.read(tar) == tars.storage.read(tar)
    assert converted.image_bytes(0) == (images / "image_000.jpg").read_bytes()
    assert (
        build(build_recipe(tmp_path / "converted", images, store="webdataset", images="copy"), QUIET).shards
        == 0
    )


@pytest.mark.parametrize("codec", ["bf16", "int4-hadamard", "int4-phi-s"])
def test_levels_by_themselves_are_what_they_were_among_all(tmp_path: Path, codec: str) -> None:
    tables = safetensors.torch.save(get_codec(codec).calibrate(torch.randn(2, 4, 2, 2, 8)).state())
    spec = teacher_spec(codec=codec, cls_token=True)
    spec = spec.model_copy(update={"tables_hash": xxhash.xxh3_128_hexdigest(tables)})
    images = make_images(tmp_path / "images", 4)
    cache = make_cache(tmp_path / "cache", images, teachers={"t": spec})
    cache.storage.write(tables_name("t"), tables)
    part = subset(cache.storage.url, str(tmp_path / "part"), levels=[-1, 1]).run()
    assert_sound(part)
    assert part.spec.teachers["t"].block_indices == (1, 3)
    rows = part.index.rows([0, 1, 3], 1)
    assert torch.equal(part.feature_maps("t", rows), cache.feature_maps("t", rows)[:, [1, 3]])
    assert torch.equal(part.read_tokens(rows, "t", "cls"), cache.read_tokens(rows, "t", "cls")[:, [1, 3]])


@pytest.mark.parametrize(
    ("codec", "levels", "expected"),
    [
        ("f16", [4], "some of 0…3"),
        ("f16", [], "some of 0…3"),
        ("int4-dct", [0], "all: int4-dct codes them together"),
    ],
)
def test_levels_that_are_not_there_by_themselves_are_refused(
    tmp_path: Path, codec: str, levels: list[int], expected: str
) -> None:
    teachers = {"t": teacher_spec(width=16, codec=codec)}
    cache = make_cache(tmp_path / "cache", make_images(tmp_path / "images", 2), teachers=teachers)
    with pytest.raises(CacheError, match=f"(?s)t cannot be stored with these levels.*{expected}"):
        subset(cache.storage.url, str(tmp_path / "part"), levels=levels)
    assert not (tmp_path / "part").exists()


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_merge_links_the_shards_of_disjoint_parts(tmp_path: Path, store: StoreKind) -> None:
    folders = parts(tmp_path)
    caches = [
        make_cache(tmp_path / f"cache{i}", folder, teachers=TEACHERS, store=store, invalid_samples=[i])
        for i, folder in enumerate(folders)
    ]
    for i, cache in enumerate(caches):
        entry = QuarantineEntry(sample_index=i, key=cache.key(i), location="", reason="cut")
        cache.manifest.write_quarantine(0, [entry])
    before = [files(tmp_path / f"cache{i}") for i in range(2)]
    urls = [cache.storage.url for cache in caches]
    merged = merge(urls, str(tmp_path / "merged")).run()
    assert [files(tmp_path / f"cache{i}") for i in range(2)] == before
    assert_sound(merged)
    assert (merged.num_samples, merged.spec.num_shards) == (9, 4)
    assert merged.valid_samples().tolist() == [1, 2, 3, 4, 5, 7, 8]
    assert_rows_are(merged, caches[0], [1, 2, 3, 4], [1, 2, 3, 4])
    assert_rows_are(merged, caches[1], [5, 7, 8], [0, 2, 3])
    assert [entry.sample_index for entry in merged.manifest.quarantine()] == [0, 6]
    shards = [
        name for name in files(tmp_path / "merged") if name.startswith("teachers") and "json" not in name
    ]
    assert shards
    assert all((tmp_path / "merged" / name).stat().st_nlink == 2 for name in shards)
    assert merge(urls, str(tmp_path / "merged")).steps == []


def test_merge_copies_where_it_cannot_link(tmp_path: Path) -> None:
    caches = [
        make_cache(tmp_path / f"cache{i}", folder, hashes=False) for i, folder in enumerate(parts(tmp_path))
    ]
    urls = [cache.storage.url for cache in caches]
    merged = merge(urls, f"memory://{tmp_path.name}/merged").run()
    assert_sound(merged)
    name = caches[1].store.shard_files("alpha", 0)[0]
    data = bytearray(caches[1].storage.read(name))
    data[0] ^= 1
    caches[1].storage.write(name, data)
    with pytest.raises(CorruptShardError, match="checksum"):
        merge(urls, f"memory://{tmp_path.name}/broken").run()


def test_merge_refuses_what_would_mix(tmp_path: Path) -> None:
    one, two = parts(tmp_path)
    first = make_cache(tmp_path / "first", one, teachers=TEACHERS)
    other: dict[str, dict[str, Any]] = {
        r"teachers.t.codec: the first cache has 'f16', this one has 'f32'|codec": {
            "teachers": TEACHERS | {"t": teacher_spec(cls_token=True)}
        },
        r"teachers: the first cache has \['t', 'u'\], this one \['t'\]": {"teachers": {"t": TEACHERS["t"]}},
        "views.num_views: the first cache has 2, this one 3": {"teachers": TEACHERS, "num_views": 3},
        "rows_per_shard: the first cache has 6, this one 4": {"teachers": TEACHERS, "samples_per_shard": 2},
        "store: the first cache has 'zarr', this one 'webdataset'": {
            "teachers": TEACHERS,
            "store": "webdataset",
        },
    }
    for number, (message, changes) in enumerate(other.items()):
        second = make_cache(tmp_path / f"second{number}", two, **changes)
        with pytest.raises(CacheMismatchError, match=message):
            merge([first.storage.url, second.storage.url], str(tmp_path / "out"))
    with pytest.raises(CacheMismatchError, match="5 samples are in more than one of them: p0_image_000"):
        merge([first.storage.url, first.storage.url], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_merged_cache_of_one_source_grows_by_a_teacher(tmp_path: Path) -> None:
    """Two machines build halves of a folder of tars; what they made is one cache of the folder."""
    from tests.images import tar_bytes

    folder = tmp_path / "tars"
    for part, images in enumerate(parts(tmp_path, (3, 4))):
        members = [(path.name, path.read_bytes()) for path in sorted(images.iterdir())]
        write_folder(folder, {f"train-{part}.tar": tar_bytes(members)})
    urls = [str(tmp_path / f"cache{part}") for part in range(2)]
    for part, url in enumerate(urls):
        build(build_recipe(url, f"{folder}/train-{part}*.tar"), QUIET)
    merged = merge(urls, str(tmp_path / "merged")).run()
    assert_sound(merged)
    tiny = {"model": "vit_tiny_patch16_224", "pretrained": False, "codec": "f32"}
    teachers = {"tiny": tiny, "late": tiny | {"random_seed": 7}}
    grown = build(build_recipe(tmp_path / "merged", folder, teachers=teachers), QUIET).cache
    assert_sound(grown)
    whole = build(build_recipe(tmp_path / "whole", folder, teachers=teachers), QUIET).cache
    for sample in range(grown.num_samples):
        row, other = grown.index.rows(sample, 1), whole.index.rows(whole.find(grown.key(sample)), 1)
        for name in teachers:
            found, expected = grown.read(row)[name].decode(), whole.read(other)[name].decode()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_copied_images_are_merged_without_their_source(tmp_path: Path) -> None:
    for i, folder in enumerate(parts(tmp_path, (2, 3))):
        build(build_recipe(tmp_path / f"cache{i}", folder, images="copy"), QUIET)
    image = (tmp_path / "part1" / "p1_image_000.jpg").read_bytes()
    shutil.rmtree(tmp_path / "part1")
    merged = merge([str(tmp_path / f"cache{i}") for i in range(2)], str(tmp_path / "merged")).run()
    assert_sound(merged)
    assert merged.image_bytes(2) == image
    assert merged.spec.dataset.location == str(tmp_path)
    assert merged.samples["path"][2].as_py() == "part1/p1_image_000.jpg"


def test_a_merged_cache_is_not_taken_for_its_first_part(tmp_path: Path) -> None:
    folders = parts(tmp_path, (2, 3))
    for i, folder in enumerate(folders):
        build(build_recipe(tmp_path / f"cache{i}", folder), QUIET)
    merge([str(tmp_path / f"cache{i}") for i in range(2)], str(tmp_path / "merged")).run()
    tiny = {"model": "vit_tiny_patch16_224", "pretrained": False, "codec": "f32"}
    teachers = {"tiny": tiny, "late": tiny | {"random_seed": 7}}
    with pytest.raises(CacheMismatchError, match="3 of 5 samples are gone from the source"):
        build(build_recipe(tmp_path / "merged", folders[0], teachers=teachers), QUIET)
    assert FeatureCache.open(tmp_path / "merged").teachers == ["tiny"]


@pytest.mark.parametrize(
    ("location", "paths", "root"),
    [
        ("/data/train", ["a.jpg", "b/c.jpg"], "/data/train"),
        ("/data/train.tar", ["train.tar"], "/data"),
        ("/data/train-*.tar", ["train-0.tar", "train-1.tar"], "/data"),
        ("/data/*/x-?.tar", ["a/x-0.tar"], "/data"),
        ("/*.tar", ["a.tar"], "/"),
        ("s3://bucket/train/", ["a.jpg"], "s3://bucket/train"),
        ("s3://bucket/train.parquet", ["train.parquet"], "s3://bucket"),
    ],
)
def test_the_folder_of_a_source_is_told_by_names(location: str, paths: list[str], root: str) -> None:
    assert Place.root(location, paths) == root


def test_damaged_copies_of_images_are_found_and_not_copied(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 6)
    cache = build(build_recipe(tmp_path / "cache", images, images="copy"), QUIET).cache
    tar = tmp_path / "cache" / "images" / "00000.tar"
    data = bytearray(tar.read_bytes())
    offset, nbytes = cache.commits("images")[0].members[0]
    data[offset + nbytes // 2] ^= 1
    tar.write_bytes(data)
    careful = FeatureCache.open(tmp_path / "cache", checksums=True)
    for sample in (0, 1):
        with pytest.raises(CorruptShardError, match=r"images/00000.tar is not the file(.|\n)*repair"):
            careful.image_bytes(sample)
    assert careful.image_bytes(3) == (images / "image_003.jpg").read_bytes()
    with pytest.raises(CorruptShardError, match=r"images/00000\.tar is not the file"):
        subset(str(tmp_path / "cache"), str(tmp_path / "small"), keys=["image_001", "image_004"]).run()
    assert not (tmp_path / "small" / "commits" / "images").exists()
    tar.unlink()
    with pytest.raises(CorruptShardError, match=r"images/00000\.tar is missing"):
        FeatureCache.open(tmp_path / "cache", checksums=True).image_bytes(0)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves closing tars to the collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_keys_with_dots_and_underscores_are_samples_of_plain_webdataset(tmp_path: Path) -> None:
    plain = make_images(tmp_path / "plain", 3)
    names = ["__1__/a.jpg", "v1.0/a.b.jpg", "v1.0/a%2Eb.jpg"]
    images = [path.read_bytes() for path in sorted(plain.iterdir())]
    write_folder(tmp_path / "images", dict(zip(names, images, strict=True)))
    recipe = build_recipe(tmp_path / "cache", tmp_path / "images", store="webdataset", images="copy")
    cache = build(recipe, QUIET).cache
    assert_sound(cache)
    keys = cache.samples["key"].to_pylist()
    for tar in ("teachers/tiny/00000.tar", "images/00000.tar"):
        samples = list(webdataset.WebDataset(str(tmp_path / "cache" / tar), shardshuffle=False))
        assert [unquote(sample["__key__"]) for sample in samples] == keys
    gc.collect()
    assert [sample["jpg"] for sample in samples] == [cache.image_bytes(i) for i in range(3)]


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_subset_by_keys_packs_the_rows(tmp_path: Path, store: StoreKind) -> None:
    images = make_images(tmp_path / "images", 8)
    source = make_cache(tmp_path / "cache", images, teachers=TEACHERS, store=store, invalid_samples=[2])
    entry = QuarantineEntry(sample_index=2, key="image_002", location="image_002.jpg", reason="cut")
    source.manifest.write_quarantine(0, [entry])
    keys = ["image_007", "image_002", "image_000", "image_005"]
    small = subset(source.storage.url, str(tmp_path / "small"), keys=keys).run()
    assert_sound(small)
    assert small.samples["key"].to_pylist() == sorted(keys)
    assert small.valid_samples().tolist() == [0, 2, 3]
    assert_rows_are(small, source, [0, 2, 3], [0, 5, 7])
    (entry,) = small.manifest.quarantine()
    assert (entry.sample_index, entry.reason) == (1, "cut")
    with pytest.raises(CacheError, match=r"1 of 2 keys(.|\n)*image_99(.|\n)*did you mean"):
        subset(source.storage.url, str(tmp_path / "none"), keys=["image_000", "image_99"])


def test_shards_of_another_cache_are_not_taken_for_one_s_own(tmp_path: Path, source: FeatureCache) -> None:
    out = tmp_path / "out"
    subset(source.storage.url, str(out), fraction=0.5).run()
    (out / "cache.json").unlink()
    with pytest.raises(CacheMismatchError, match=r"Shards of another cache(.|\n)*without cache\.json"):
        subset(source.storage.url, str(out), fraction=1.0)


def test_subset_by_fraction_is_nested_and_seeded(tmp_path: Path, source: FeatureCache) -> None:
    def keys(fraction: float, seed: int) -> set[str]:
        out = str(tmp_path / f"{fraction}-{seed}")
        small = subset(source.storage.url, out, fraction=fraction, seed=seed).run()
        assert_sound(small)
        return set(small.samples["key"].to_pylist())

    assert [len(keys(fraction, 0)) for fraction in (0.25, 0.5, 1.0)] == [2, 4, 8]
    assert keys(0.25, 0) < keys(0.5, 0)
    assert keys(0.5, 0) != keys(0.5, 1)
    for fraction in (0.0, 0.01, 1.5):
        with pytest.raises(CacheError, match="would be empty"):
            subset(source.storage.url, str(tmp_path / "none"), fraction=fraction)


def test_subset_by_teachers_links_whole_shards(tmp_path: Path, source: FeatureCache) -> None:
    small = subset(source.storage.url, str(tmp_path / "small"), teachers=["t"]).run()
    assert_sound(small)
    assert small.teachers == ["t"]
    assert small.spec.content_id("t") == source.spec.content_id("t")
    valid = source.valid_samples().tolist()
    assert_rows_are(small, source, valid, valid)
    name = small.store.shard_files("t", 0)[0]
    assert (tmp_path / "small" / name).stat().st_nlink == 2
    with pytest.raises(CacheError, match="did you mean t"):
        subset(source.storage.url, str(tmp_path / "none"), teachers=["tt"])


def test_subset_of_a_grown_cache_with_copied_images(tmp_path: Path) -> None:
    """Of a cache in several segments, whose views do not divide its shards."""
    images = make_images(tmp_path / "images", 5)
    path = str(tmp_path / "cache")
    (images / "image_003.jpg").write_bytes(b"no image")
    for num_views in (2, 5):
        views = {"num_views": num_views, "size": [32, 32]}
        grown = build(build_recipe(path, images, views=views, images="copy"), QUIET).cache
    keys = ["image_001", "image_003", "image_004"]
    small = subset(path, str(tmp_path / "small"), keys=keys).run()
    assert_sound(small)
    assert small.num_views == 5
    assert small.valid_samples().tolist() == [0, 2]
    for view in range(5):
        found = small.read(small.index.rows([0, 2], view))["tiny"].decode()
        assert torch.equal(found, grown.read(grown.index.rows([1, 4], view))["tiny"].decode())
    for path_ in images.iterdir():
        path_.unlink()
    assert [small.image_bytes(i) for i in (0, 2)] == [grown.image_bytes(i) for i in (1, 4)]


def test_what_is_not_committed_is_left_out_and_made_later(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 8)
    source = make_cache(tmp_path / "cache", images, skip_shards=[1])
    runs: list[Callable[[], Rearrangement]] = [
        lambda: convert(str(tmp_path / "cache"), str(tmp_path / "tars"), "webdataset"),
        lambda: subset(str(tmp_path / "cache"), str(tmp_path / "half"), keys=["image_000", "image_004"]),
        lambda: subset(str(tmp_path / "cache"), str(tmp_path / "alpha"), teachers=["alpha"]),
    ]
    assert [len(run().run().commits("alpha")) for run in runs] == [2, 0, 2]
    from tests.make_cache import commit_shard

    for name in source.teachers:
        commit_shard(source, name, 1)
    for run in runs:
        done = run().run()
        done.require_complete()
        assert_sound(done)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves closing tars to the collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_theias_loader_finds_what_it_expects(tmp_path: Path, source: FeatureCache) -> None:
    """Its loader's own steps (`data_utils.py`): globs, lower-case fields, safetensors, "c h w"."""
    count = export_theia(source, str(tmp_path / "theia"), dataset="imagenet", samples_per_shard=10)
    assert count == 14
    root = tmp_path / "theia" / "imagenet"
    assert json.loads((root / "splits.json").read_text()) == {"train": 14, "val": 0, "test": 0}
    columns: dict[str, list[dict[str, Any]]] = {}
    for column in ("images", "t", "u"):
        tars = sorted(str(path) for path in (root / column).glob("*-train.tar"))
        assert [Path(tar).name for tar in tars] == [f"imagenet_train-00000{i}-train.tar" for i in range(2)]
        columns[column] = list(webdataset.WebDataset(tars, shardshuffle=False))
    gc.collect()
    keys = [sample["__key__"] for sample in columns["images"]]
    assert keys[:3] == ["image_000_v0", "image_000_v1", "image_001_v0"]
    assert not any("image_002" in key for key in keys)
    written = features(source.spec, "t")
    rows = source.index.rows(source.valid_samples()[:, None], [0, 1]).ravel().tolist()
    for row, image, t, u in zip(rows, columns["images"], columns["t"], columns["u"], strict=True):
        assert image["__key__"] == t["__key__"] == u["__key__"]
        pixels = np.load(io.BytesIO(image["image"]), allow_pickle=False)
        expected = render_view(source.image(row // 2), source.view(row)).permute(1, 2, 0)
        assert np.array_equal(pixels, expected.numpy())
        tensors = safetensors.torch.load(t["t.safetensors"])
        assert torch.equal(tensors["embedding"], written["codes"][row][-1].permute(2, 0, 1).bfloat16())
        assert torch.equal(tensors["cls_token"], written["cls"][row][-1].bfloat16())
        assert safetensors.torch.load(u["u.safetensors"])["embedding"].shape == (4, 3, 3)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_theias_tars_keep_keys_that_a_plain_header_would_cut(tmp_path: Path) -> None:
    folder, long = make_images(tmp_path / "images", 1), "long" * 40
    (folder / "image_000.jpg").rename(folder / f"{long}.jpg")
    export_theia(make_cache(tmp_path / "cache", folder, num_views=1), str(tmp_path / "out"))
    tars = sorted(str(path) for path in (tmp_path / "out").rglob("*.tar"))
    keys = [sample["__key__"] for sample in webdataset.WebDataset(tars, shardshuffle=False)]
    gc.collect()
    assert keys == [long] * 3, "images and two teachers"


def test_theia_exports_are_not_mixed(tmp_path: Path, source: FeatureCache) -> None:
    out = tmp_path / "theia"
    assert export_theia(source, str(out)) == 14
    before = files(out)
    (out / "imagenet" / "u" / "imagenet_train-000000-train.tar").unlink()
    assert export_theia(source, str(out)) == 14
    assert files(out) == before
    other = make_cache(tmp_path / "other", make_images(tmp_path / "more", 3), teachers=TEACHERS)
    again: list[tuple[FeatureCache, dict[str, Any]]] = [
        (source, {"level": 0}),
        (source, {"samples_per_shard": 4}),
        (other, {}),
    ]
    for cache, changes in again:
        with pytest.raises(CacheMismatchError, match=r"Another export(.|\n)*cache_id(.|\n)*--split"):
            export_theia(cache, str(out), **changes)
    assert files(out) == before
    assert export_theia(other, str(out), split="val") == 6
    (out / "imagenet" / "imagenet_train.json").unlink()
    with pytest.raises(CacheMismatchError, match="tars without that file"):
        export_theia(source, str(out))


def test_theia_needs_a_level_that_is_stored(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", make_images(tmp_path / "images", 2))
    with pytest.raises(CacheError, match=r"level 9 of(.|\n)*is stored"):
        export_theia(cache, str(tmp_path / "theia"), level=9)
