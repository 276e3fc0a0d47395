"""Builds with calibrated codecs and the adjoint grid, and the budget that chooses them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from cache_builder import build, build_teacher
from cache_builder.budget import choose, options, parse_bytes
from cache_builder.builder import prepare
from cache_builder.calibrate import CalibrationSample
from pipeline import FeatureCache, render_view
from pipeline.errors import CacheError, DiskSpaceError, RecipeError
from pipeline.grids import stored_form
from tests.make_cache import build_recipe, make_images

QUIET = Console(quiet=True)
TEACHER = {"model": "vit_tiny_patch16_224", "pretrained": False, "image_size": 96}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 8)


def test_a_calibrated_codec_is_what_its_fidelity_says(tmp_path: Path, images: Path) -> None:
    cache = build(
        build_recipe(tmp_path / "cache", images, teachers={"t": TEACHER | {"codec": "int8-hadamard"}}), QUIET
    ).cache
    spec = cache.spec.teachers["t"]
    assert (tmp_path / "cache" / "stats" / "t.safetensors").exists()
    assert cache.spec.fidelity["t"]["cosine_mean"] > 0.999
    live = build_teacher(spec)(render_view(cache.image(2), cache.view(5), spec.render_size)[None])
    decoded = cache.read([5])["t"].decode()
    error = (decoded - live.feature_maps_BSHWC).norm() / live.feature_maps_BSHWC.norm()
    assert error < 2 * cache.spec.fidelity["t"]["raw_relative_l2"] + 1e-6
    assert cache.read([5])["t"].nbytes < 0.56 * live.feature_maps_BSHWC.numel() * 2


def test_tables_are_part_of_what_a_row_is(tmp_path: Path, images: Path) -> None:
    recipe = build_recipe(tmp_path / "cache", images, teachers={"t": TEACHER | {"codec": "int4-hadamard"}})
    cache = build(recipe, QUIET).cache
    assert build(recipe, QUIET).shards == 0
    tables = tmp_path / "cache" / "stats" / "t.safetensors"
    data = bytearray(tables.read_bytes())
    data[-1] ^= 1
    tables.write_bytes(data)
    with pytest.raises(CacheError, match="is not what the features of t were encoded with"):
        FeatureCache.open(cache.storage.url).read([0])


def test_the_adjoint_grid_stores_what_the_loss_needs(tmp_path: Path, images: Path) -> None:
    teacher = TEACHER | {"codec": "f32", "grid": "adjoint", "grid_size": [2, 2]}
    cache = build(build_recipe(tmp_path / "cache", images, teachers={"t": teacher}), QUIET).cache
    spec = cache.spec.teachers["t"]
    assert (spec.native_grid, spec.stored_grid) == ((6, 6), (2, 2))
    live = build_teacher(spec)(render_view(cache.image(1), cache.view(3), spec.render_size)[None])
    stored, norms = stored_form(live.feature_maps_BSHWC, spec.grid)
    read = cache.read([3])["t"]
    torch.testing.assert_close(read.decode(), stored, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(read.arrays["norms"], norms, rtol=1e-5, atol=1e-4)


def test_a_budget_is_kept_at_the_least_loss(tmp_path: Path, images: Path) -> None:
    recipe = build_recipe(
        tmp_path / "cache", images, teachers={"t": TEACHER, "u": TEACHER | {"random_seed": 3}}
    )
    drafted, spec, _ = prepare(recipe, QUIET)
    sample = CalibrationSample.draw(drafted.source, drafted.samples, drafted.views, 6)
    available = dict(options(drafted.spec.teachers, sample, (2, 2), batch_size=4))
    assert {option.spec.grid.kind for found in available.values() for option in found} == {"adjoint"}
    largest = choose(available, spec.num_rows, 10**12)
    assert {option.spec.codec for option in largest.values()} == {"f16"}
    total = spec.num_rows * sum(option.bytes_per_row for option in largest.values())
    smaller = choose(available, spec.num_rows, total // 2)
    assert spec.num_rows * sum(option.bytes_per_row for option in smaller.values()) <= total // 2
    with pytest.raises(DiskSpaceError, match="at least"):
        choose(available, spec.num_rows, 100)


def test_a_build_over_its_budget_is_refused(tmp_path: Path, images: Path) -> None:
    with pytest.raises(DiskSpaceError, match="larger than its budget"):
        build(build_recipe(tmp_path / "cache", images, budget="10 kB"), QUIET)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("text", "count"), [("6TB", 6 * 10**12), ("500 GB", 5 * 10**11), ("1.5e3", 1500), ("12", 12)]
)
def test_budgets_are_read(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["much", "6 XB", "", "1..2GB"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="number of bytes"):
        parse_bytes(text)
