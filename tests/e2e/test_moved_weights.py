"""Checkpoints elsewhere than at the build: found where the recipe says, and refused if they are others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner

from teachercache import FeatureCache, build
from teachercache.cache_builder.build_recipe import BuildRecipe
from teachercache.cache_builder.builder import prepare
from teachercache.cache_builder.draft import growth
from teachercache.jobs import cli
from teachercache.pipeline.errors import CacheError, CacheMismatchError, WeightsNotFoundError
from tests.make_cache import build_recipe, make_images

QUIET = Console(quiet=True)


def weights(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    save_file(timm.create_model("vit_tiny_patch16_224", img_size=(32, 32)).state_dict(), path)
    return path


def recipe(folder: Path, checkpoint: Path, **changes: Any) -> BuildRecipe:
    tiny = {"model": "vit_tiny_patch16_224", "checkpoint": str(checkpoint), "codec": "f32"}
    return build_recipe(folder / "cache", folder / "images", **{"teachers": {"tiny": tiny}} | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete cache of the weights `w1`, their images, and the other weights `w2`."""
    make_images(tmp_path / "images", 6)
    weights(tmp_path / "w2.safetensors", 2)
    build(recipe(tmp_path, weights(tmp_path / "w1.safetensors", 1)), QUIET)
    return tmp_path


def lose_shard(folder: Path) -> Path:
    record = folder / "cache/commits/tiny/00001.json"
    record.unlink()
    return record


def test_other_weights_are_refused_by_a_complete_cache(folder: Path) -> None:
    with pytest.raises(CacheMismatchError, match=r"got:(.|\n)*expected:(.|\n)*do:"):
        build(recipe(folder, folder / "w2.safetensors"), QUIET)
    with pytest.raises(WeightsNotFoundError, match="gone"):
        build(recipe(folder, folder / "gone.safetensors"), QUIET)


def test_other_weights_compute_no_missing_shard(folder: Path) -> None:
    record = lose_shard(folder)
    with pytest.raises(CacheMismatchError, match="not the weights"):
        build(recipe(folder, folder / "w2.safetensors"), QUIET)
    assert not record.exists()


def test_the_same_weights_elsewhere_go_on_and_are_not_recorded(folder: Path) -> None:
    before = (folder / "cache/cache.json").read_bytes()
    moved = (folder / "w1.safetensors").rename(folder / "moved.safetensors")
    record = lose_shard(folder)
    assert build(recipe(folder, moved), QUIET).shards == 1
    assert record.exists()
    assert build(recipe(folder, moved), QUIET).shards == 0
    assert (folder / "cache/cache.json").read_bytes() == before


def test_growth_keeps_the_recorded_place(folder: Path) -> None:
    moved = (folder / "w1.safetensors").rename(folder / "moved.safetensors")
    views = {"num_views": 3, "size": [32, 32]}
    drafted = prepare(recipe(folder, moved, views=views), QUIET)[0]
    assert drafted.old is not None
    assert growth(drafted.old, drafted.spec) == ["1 views of each sample"]
    grown = build(recipe(folder, moved, views=views), QUIET)
    assert (grown.shards > 0, grown.cache.num_views) == (True, 3)
    assert grown.cache.spec.teachers["tiny"].checkpoint == str(folder / "w1.safetensors")


def test_verify_and_repair_find_moved_weights(folder: Path) -> None:
    def teachercache(verb: str, *arguments: object) -> tuple[int, str, BaseException | None]:
        result = CliRunner().invoke(cli.app, [verb, str(folder / "cache"), *map(str, arguments)])
        return result.exit_code, result.output, result.exception

    compare = ("verify", "--against-teacher", 2)
    moved = (folder / "w1.safetensors").rename(folder / "moved.safetensors")
    there, other = (f"teachers.tiny.checkpoint={file}" for file in (moved, folder / "w2.safetensors"))
    assert isinstance(teachercache(*compare)[2], WeightsNotFoundError)
    assert isinstance(teachercache(*compare, other)[2], CacheMismatchError)
    status, text, _ = teachercache(*compare, there)
    assert (status, "as promised" in text) == (0, True), text
    assert "Only --against-teacher" in str(teachercache("verify", there)[2])

    shard = next((folder / "cache/teachers/tiny/codes/c/1").rglob("0"))
    while shard.is_dir():
        shard = next(shard.iterdir())
    sound = shard.read_bytes()
    shard.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    status, text, _ = teachercache("repair", "batch_size=4")
    assert (status, "teachers.<name>.checkpoint" in text) == (1, True), text
    status, text, _ = teachercache("repair", "batch_size=4", other)
    assert (status, "not the weights" in text) == (1, True), text
    status, text, _ = teachercache("repair", "batch_size=4", there)
    assert (status, shard.read_bytes() == sound) == (0, True), text
    assert isinstance(teachercache("repair", "teachers.tiyn.checkpoint=x")[2], CacheError)
    assert FeatureCache.open(folder / "cache").spec.teachers["tiny"].checkpoint != str(moved)
