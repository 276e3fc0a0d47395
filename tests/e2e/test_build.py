"""Builds of real images by real (tiny) teachers, in one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console
from webdataset.tariterators import group_by_keys, tar_file_expander

from teachercache import FeatureCache, render_view
from teachercache.cache_builder import decode
from teachercache.cache_builder.builder import build
from teachercache.cache_builder.compute import Computing
from teachercache.cache_builder.extract import extract_shard
from teachercache.cache_builder.plan import Plan
from teachercache.cache_builder.repair import repair
from teachercache.cache_builder.teachers import build_teacher
from teachercache.pipeline.errors import BuildError, CacheMismatchError, DiskSpaceError, SourceNotFoundError
from teachercache.pipeline.records.manifest import Manifest
from teachercache.pipeline.records.strict import Size
from teachercache.pipeline.sources.image_folder import ImageFolderSource
from teachercache.pipeline.stores.cached_images import CachedImages
from teachercache.pipeline.verify import verify
from teachercache.pipeline.views import View
from tests.make_cache import build_recipe, make_images

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 8)


def shard_files(cache: Path) -> dict[str, bytes]:
    """Every array and table of a cache (commit records hold times, so they differ)."""
    files = [path for path in cache.rglob("*") if path.is_file() and "commits" not in path.parts]
    return {str(path.relative_to(cache)): path.read_bytes() for path in files if path.name != "cache.json"}


def test_features_are_timms(tmp_path: Path, images: Path) -> None:
    cache = build(build_recipe(tmp_path / "cache", images), QUIET).cache
    spec = cache.spec.teachers["tiny"]
    torch.manual_seed(spec.random_seed)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=spec.image_size).eval()
    rows = [0, 5, 11, 15]
    views = [render_view(cache.image(row // 2), cache.view(row), spec.render_size) for row in rows]
    pixels = torch.stack(views) / 255
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (spec.mean, spec.std))
    with torch.no_grad():
        maps = model.forward_intermediates(
            (pixels - mean) / std, indices=[2, 5, 8, 11], intermediates_only=True
        )
    by_hand = torch.stack(maps, 1).permute(0, 1, 3, 4, 2)
    torch.testing.assert_close(cache.read(rows)["tiny"].decode(), by_hand, rtol=1e-5, atol=1e-5)


def test_pooled_grids_and_tokens_are_stored(tmp_path: Path, images: Path) -> None:
    teacher = {
        "model": "vit_tiny_patch16_224",
        "pretrained": False,
        "image_size": 64,
        "grid": "bilinear",
        "grid_size": [2, 2],
        "cls_token": True,
        "global_feature": True,
        "codec": "bf16",
    }
    cache = build(build_recipe(tmp_path / "cache", images, teachers={"t": teacher}), QUIET).cache
    assert cache.read([3])["t"].decode().shape == (1, 4, 2, 2, 192)
    live = build_teacher(cache.spec.teachers["t"])
    features = live(render_view(cache.image(1), cache.view(3), (64, 64))[None])
    assert features.cls_token_BSC is not None
    torch.testing.assert_close(
        cache.read_tokens([3], "t", "cls").float(), features.cls_token_BSC, rtol=1e-2, atol=1e-2
    )
    assert cache.read_tokens([3], "t", "global").shape == (1, cache.spec.teachers["t"].global_width)


def test_building_again_computes_nothing(tmp_path: Path, images: Path) -> None:
    recipe = build_recipe(tmp_path / "cache", images)
    first = build(recipe, QUIET)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    second = build(recipe, QUIET)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert (first.shards, first.views, second.shards) == (3, 16, 0)
    assert before == after


def test_a_killed_build_continues_to_the_same_bytes(tmp_path: Path, images: Path) -> None:
    recipe = build_recipe(tmp_path / "killed", images, rows_per_shard=2)
    script = (
        "import sys; from teachercache import build; "
        "from teachercache.cache_builder.build_recipe import BuildRecipe;"
        "build(BuildRecipe.model_validate_json(sys.argv[1]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, recipe.model_dump_json()], stderr=subprocess.DEVNULL
    )
    manifest = Manifest(
        FeatureCache.open(
            build(build_recipe(tmp_path / "whole", images, rows_per_shard=2), QUIET).cache.storage.url
        ).storage
    )
    commits = tmp_path / "killed" / "commits" / "tiny"
    deadline = time.monotonic() + 120
    while not list(commits.glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = len(list(commits.glob("*.json")))
    result = build(recipe, QUIET)
    assert done >= 1
    assert result.shards == 8 - done
    assert shard_files(tmp_path / "killed") == shard_files(tmp_path / "whole")
    assert manifest.committed_shards("tiny") == set(range(8))
    assert verify(result.cache, full=True) == []


def test_another_teacher_joins_without_touching_the_first(tmp_path: Path, images: Path) -> None:
    tiny = {"model": "vit_tiny_patch16_224", "pretrained": False, "codec": "f32"}
    first = build(build_recipe(tmp_path / "cache", images), QUIET).cache
    before = shard_files(tmp_path / "cache")
    before.pop("zarr.json")  # of the root, which lists all teachers
    late = {"tiny": tiny, "late": tiny | {"random_seed": 7}}
    grown = build(build_recipe(tmp_path / "cache", images, teachers=late), QUIET).cache
    assert grown.teachers == ["late", "tiny"] or grown.teachers == ["tiny", "late"]
    assert before.items() <= shard_files(tmp_path / "cache").items()
    assert grown.spec.content_id("tiny") == first.spec.content_id("tiny")
    read = grown.read([1])
    assert not torch.equal(read["tiny"].decode(), read["late"].decode())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"views": {"num_views": 2, "size": [32, 32], "seed": 1}},
            "views.seed: the cache has 0, the recipe asks for 1",
        ),
        ({"rows_per_shard": 4}, "rows_per_shard"),
        (
            {"teachers": {"tiny": {"model": "vit_tiny_patch16_224", "pretrained": False, "codec": "f16"}}},
            "codec",
        ),
    ],
)
def test_another_spec_at_the_same_path_is_refused(
    tmp_path: Path, images: Path, change: dict[str, object], message: str
) -> None:
    build(build_recipe(tmp_path / "cache", images), QUIET)
    before = shard_files(tmp_path / "cache")
    with pytest.raises(CacheMismatchError, match=message):
        build(build_recipe(tmp_path / "cache", images, **change), QUIET)
    assert shard_files(tmp_path / "cache") == before


def test_other_images_at_the_same_path_are_refused(tmp_path: Path) -> None:
    build(build_recipe(tmp_path / "cache", make_images(tmp_path / "a", 3)), QUIET)
    with pytest.raises(CacheMismatchError, match="dataset fingerprint"):
        build(build_recipe(tmp_path / "cache", make_images(tmp_path / "b", 3, seed=1)), QUIET)


def test_undecodable_images_are_quarantined_and_the_build_goes_on(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "images", 6)
    whole = (folder / "image_001.jpg").read_bytes()
    (folder / "image_001.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "image_004.jpg").write_bytes(b"<html>not an image</html>")
    result = build(build_recipe(tmp_path / "cache", folder), QUIET)
    assert result.quarantined == 2
    assert result.cache.valid_samples().tolist() == [0, 2, 3, 5]
    reasons = {entry.key: entry.reason for entry in result.cache.manifest.quarantine()}
    assert set(reasons) == {"image_001", "image_004"}
    assert [list(record.invalid_rows) for record in result.cache.commits("tiny").values()] == [[2, 3], [8, 9]]
    reference = build(build_recipe(tmp_path / "other", make_images(tmp_path / "sound", 6)), QUIET).cache
    rows = [0, 1, 4, 7, 11]
    torch.testing.assert_close(
        result.cache.read(rows)["tiny"].decode(), reference.read(rows)["tiny"].decode()
    )


def test_teachers_read_views_where_threads_rendered_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unreadable image leaves a gap, and only the views of that batch are moved together."""
    folder = make_images(tmp_path / "images", 6)
    (folder / "image_004.jpg").write_bytes(b"<html>not an image</html>")
    rendered, read = set[int](), list[set[int]]()

    def render(image: Image.Image, view: View, size: Size, out: torch.Tensor) -> None:
        rendered.add(out.data_ptr())
        render_view(image, view, size, out=out)

    def views_of(computing: Computing, name: str, pixels: dict[Size, torch.Tensor]) -> torch.Tensor:
        views = of_teacher(computing, name, pixels)
        read.append({view.data_ptr() for view in views})
        return views

    of_teacher = Computing.views_of
    monkeypatch.setattr(decode, "render_view", render)
    monkeypatch.setattr(Computing, "views_of", views_of)
    build(build_recipe(tmp_path / "cache", folder, rows_per_shard=12), QUIET)
    assert [len(views) for views in read] == [4, 4, 2]
    assert [views <= rendered for views in read] == [True, True, False]


def test_images_that_moved_are_asked_for(tmp_path: Path) -> None:
    cache = build(build_recipe(tmp_path / "cache", make_images(tmp_path / "images", 3)), QUIET).cache
    (tmp_path / "images").rename(tmp_path / "moved")
    advice = r"images=PATH for `teachercache train`, --images PATH"
    for opened in (cache, FeatureCache.open(tmp_path / "cache")):  # of one, the source was open before
        with pytest.raises(SourceNotFoundError, match=advice):
            opened.image(0)
    assert FeatureCache.open(tmp_path / "cache", str(tmp_path / "moved")).image(0).size == (64, 48)
    with pytest.raises(SourceNotFoundError, match="check the path"):
        FeatureCache.open(tmp_path / "cache", str(tmp_path / "nowhere")).image(0)
    (tmp_path / "images").mkdir()  # as a mount point without its disk
    with pytest.raises(SourceNotFoundError, match=f"no image_000.jpg in(.|\n)*{advice}"):
        FeatureCache.open(tmp_path / "cache").image(0)


def test_copied_images_need_no_source(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "images", 5)
    originals = {path.stem: path.read_bytes() for path in folder.iterdir()}
    cache = build(build_recipe(tmp_path / "cache", folder, images="copy"), QUIET).cache
    for path in folder.iterdir():
        path.unlink()
    opened = FeatureCache.open(tmp_path / "cache")
    assert {opened.key(i): opened.image_bytes(i) for i in range(5)} == originals
    assert verify(cache, full=True) == []
    tar = tmp_path / "cache" / "images" / "00000.tar"
    with tarfile.open(tar) as archive:
        assert archive.getnames() == ["image_000.jpg", "image_001.jpg", "image_002.jpg"]
    with tar.open("rb") as stream:
        samples = list(group_by_keys(tar_file_expander([{"url": tar.name, "stream": stream}])))
    copies = {sample["__key__"]: sample["jpg"] for sample in samples}
    assert copies == {key: originals[key] for key in ("image_000", "image_001", "image_002")}


def test_a_source_that_vanishes_fails_the_shards_and_says_so(tmp_path: Path, images: Path) -> None:
    folder = make_images(tmp_path / "images", 4)
    recipe = build_recipe(tmp_path / "cache", folder, rows_per_shard=2, runner={"max_attempts": 2})
    cache = build(recipe, QUIET).cache
    for shard in (1, 3):
        cache.storage.remove(f"commits/tiny/{shard:05d}.json")
    (folder / "image_003.jpg").rename(tmp_path / "elsewhere.jpg")
    teachers = {"tiny": build_teacher(cache.spec.teachers["tiny"])}
    with pytest.raises(FileNotFoundError):
        extract_shard(cache, 3, teachers)
    (tmp_path / "elsewhere.jpg").rename(folder / "image_003.jpg")
    record = extract_shard(cache, 3, teachers)["tiny"]
    assert (record.num_rows, record.worker) == (2, f"{record.host}:{os.getpid()}")
    assert build(recipe, QUIET).shards == 1


def test_failed_shards_end_the_build_after_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_images(tmp_path / "images", 4)
    recipe = build_recipe(tmp_path / "cache", folder, rows_per_shard=2, runner={"max_attempts": 2})
    read = CachedImages.read_source
    calls: list[int] = []

    def fail_on_2(self: CachedImages, index: int) -> bytes:
        if index == 2:
            calls.append(index)
            raise OSError("I/O error on the disk")
        return read(self, index)

    monkeypatch.setattr(CachedImages, "read_source", fail_on_2)
    with pytest.raises(
        BuildError, match=r"1 of 4 shards failed(.|\n)*shard 2: OSError: I/O error on the disk"
    ):
        build(recipe, QUIET)
    assert len(calls) == 2
    assert Manifest(FeatureCache.open(tmp_path / "cache").storage).committed_shards("tiny") == {0, 1, 3}


def test_a_full_disk_is_refused_before_anything_is_written(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(DiskSpaceError, match=r"got: +1 kB free(.|\n)*smaller grid and codec"):
        build(build_recipe(tmp_path / "cache", images), QUIET)
    assert not (tmp_path / "cache").exists()


def test_the_plan_states_what_the_disk_will_hold(tmp_path: Path, images: Path) -> None:
    from teachercache.cache_builder.builder import prepare

    recipe = build_recipe(tmp_path / "cache", images)
    plan: Plan = prepare(recipe, QUIET)[2]
    assert (plan.spec.num_rows, plan.spec.num_shards, plan.num_files) == (16, 3, 9)
    build(recipe, QUIET)
    files = [*(tmp_path / "cache").rglob("c/*/0/0/0/0"), *(tmp_path / "cache").glob("stats/*/*")]
    roundings = 3 * 4 + 2 * 20 + 3 * 512  # a crc32c an index; the last shard is short by two rows; headers
    assert sum(path.stat().st_size for path in files) == pytest.approx(plan.total_bytes, abs=roundings)
    assert prepare(recipe, QUIET)[2].missing_bytes == 0
    assert np.isclose(plan.gpu_hours, 2e9 * plan.teachers[0].gmacs * 16 / 300e12 / 3600)


def test_the_plan_counts_the_images_that_are_not_copied_yet(tmp_path: Path, images: Path) -> None:
    from teachercache.cache_builder.builder import prepare

    recipe = build_recipe(tmp_path / "cache", images, images="copy")
    sizes = [path.stat().st_size for path in sorted(images.iterdir())]
    plan: Plan = prepare(recipe, QUIET)[2]
    assert (plan.image_bytes, plan.missing_image_bytes) == (sum(sizes), sum(sizes))
    build(recipe, QUIET)
    (tmp_path / "cache/commits/tiny/00001.json").unlink()
    plan = prepare(recipe, QUIET)[2]
    [tiny] = plan.teachers
    assert plan.missing_bytes == 6 * tiny.bytes_per_row + tiny.statistics_bytes
    build(recipe, QUIET)
    (tmp_path / "cache/commits/images/00001.json").unlink()
    plan = prepare(recipe, QUIET)[2]
    assert (plan.missing_bytes, plan.image_bytes) == (sum(sizes[3:6]), sum(sizes))


def test_a_lost_cache_json_is_written_again_by_the_build(tmp_path: Path, images: Path) -> None:
    teacher = {"model": "vit_tiny_patch16_224", "pretrained": False, "codec": "int8-hadamard"}
    recipe = build_recipe(tmp_path / "cache", images, teachers={"tiny": teacher})
    first = build(recipe, QUIET).cache
    expected = first.read([3])["tiny"].decode()
    before = shard_files(tmp_path / "cache")
    (tmp_path / "cache" / "cache.json").unlink()
    again = build(recipe, QUIET)
    assert again.shards == 0
    assert again.cache.spec.cache_id == first.spec.cache_id
    assert torch.equal(again.cache.read([3])["tiny"].decode(), expected)
    assert shard_files(tmp_path / "cache") == before
    assert verify(again.cache, full=True) == []


def test_shards_of_another_spec_are_not_taken_for_its_own(tmp_path: Path, images: Path) -> None:
    build(build_recipe(tmp_path / "cache", images), QUIET)
    (tmp_path / "cache" / "cache.json").unlink()
    other = {"tiny": {"model": "vit_tiny_patch16_224", "pretrained": False, "codec": "f32", "random_seed": 1}}
    with pytest.raises(CacheMismatchError, match=r"cache.json is gone(.|\n)*restore cache.json from a copy"):
        build(build_recipe(tmp_path / "cache", images, teachers=other), QUIET)
    assert not (tmp_path / "cache" / "cache.json").exists()


def test_shards_of_another_store_are_not_taken_for_its_own(tmp_path: Path, images: Path) -> None:
    build(build_recipe(tmp_path / "cache", images), QUIET)
    (tmp_path / "cache" / "cache.json").unlink()
    with pytest.raises(
        CacheMismatchError, match=r"cache.json is gone(.|\n)*does not name teachers/tiny/00000"
    ):
        build(build_recipe(tmp_path / "cache", images, store="webdataset"), QUIET)
    assert not (tmp_path / "cache" / "cache.json").exists()


def test_every_record_is_compared_where_cache_json_is_lost(tmp_path: Path, images: Path) -> None:
    cache = build(build_recipe(tmp_path / "cache", images), QUIET).cache
    assert cache.spec.num_shards > 2
    record = cache.manifest.read_commit("tiny", 1)
    cache.manifest.commit(record.model_copy(update={"content_id": "0" * 32}))
    (tmp_path / "cache" / "cache.json").unlink()
    with pytest.raises(CacheMismatchError, match=r"00001\.json was computed for another spec"):
        build(build_recipe(tmp_path / "cache", images), QUIET)


def test_a_build_that_goes_on_does_not_scan_again(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = build_recipe(tmp_path / "cache", make_images(tmp_path / "images", 4))
    cache = build(recipe, QUIET).cache
    cache.storage.remove("commits/tiny/00001.json")
    scans: list[int] = []
    scan = ImageFolderSource.scan

    def count_and_scan(self: ImageFolderSource, **options: Any) -> pa.Table:
        scans.append(1)
        return scan(self, **options)

    monkeypatch.setattr(ImageFolderSource, "scan", count_and_scan)
    assert build(recipe, QUIET).shards == 1
    assert scans == []
    (tmp_path / "images" / "image_002.jpg").write_bytes(b"something else")
    with pytest.raises(CacheMismatchError, match="fingerprint"):
        build(recipe, QUIET)
    assert scans == [1]


def test_a_build_goes_on_where_the_images_have_moved_to(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "images", 4)
    cache = build(build_recipe(tmp_path / "cache", folder, rows_per_shard=2), QUIET).cache
    for shard in (0, 2):
        cache.storage.remove(f"commits/tiny/{shard:05d}.json")
    folder.rename(tmp_path / "moved")
    moved = build_recipe(tmp_path / "cache", tmp_path / "moved", rows_per_shard=2)
    assert build(moved, QUIET).shards == 2
    cache.storage.remove("commits/tiny/00001.json")
    (tmp_path / "cache" / "commits" / "tiny" / "00003.json").write_text("{}")
    assert [problem.file for problem in repair(FeatureCache.open(tmp_path / "cache")).left]
    done = repair(FeatureCache.open(tmp_path / "cache", str(tmp_path / "moved")))
    assert ([problem.file for problem in done.mended], done.left) == (["commits/tiny/00003.json"], [])
