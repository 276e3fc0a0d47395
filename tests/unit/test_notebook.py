"""A cache in a notebook: `cache[key]`, and the cache as labelled arrays."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from pipeline import FeatureCache, render_view
from pipeline.errors import CacheError, IncompleteCacheError
from tests.make_cache import make_cache, make_images, teacher_spec


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_images(tmp_path_factory.mktemp("images"), 6)
    (folder / "a").mkdir()
    (folder / "image_000.jpg").rename(folder / "a" / "<b>.jpg")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, images: Path) -> FeatureCache:
    """Two shards of 3 samples × 2 views; sample 4 could not be decoded."""
    teachers = {"alpha": teacher_spec(), "beta <b>": teacher_spec(width=4, grid=3, codec="bf16")}
    return make_cache(tmp_path_factory.mktemp("cache") / "c", images, teachers=teachers, invalid_samples=[4])


def test_a_sample_by_key_and_by_number(cache: FeatureCache) -> None:
    key = cache.key(3)
    sample = cache[key]
    row = int(cache.index.rows(3, 1))
    assert (sample.key, sample.sample_index, sample.row(1)) == (key, 3, row)
    assert sample.features("alpha", view=1).equal(cache.read([row])["alpha"].decode()[0])
    rendered = render_view(cache.image(3), cache.view(row)).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(sample.pixels(1), rendered)
    assert (cache[np.int64(3)].key, cache[-1].key) == (key, cache.key(5))
    assert [one.key for one in cache] == cache.samples["key"].to_pylist()  # type: ignore[attr-defined]
    with pytest.raises(KeyError, match="near: image_003"):
        cache["image_0033"]
    for wrong in (6, -7):
        with pytest.raises(IndexError):
            cache[wrong]
    with pytest.raises(IndexError):
        sample.features("alpha", view=2)
    with pytest.raises(CacheError, match="could not be decoded"):
        cache[4].features("alpha")


def test_a_notebook_shows_it(cache: FeatureCache) -> None:
    html = cache["a/<b>"]._repr_html_()
    assert html.count("<img") == 1 + 2 * 4
    assert set(re.findall(r"src='(data:image/\w+)", html)) == {"data:image/png", "data:image/jpeg"}
    assert "a/&lt;b&gt;" in html
    assert "<b>" not in html
    assert "http" not in html
    assert repr(cache["a/<b>"]).startswith("SampleView('a/<b>', number 0 of ")
    invalid = cache[4]._repr_html_()
    assert invalid.count("<img") == 1
    assert invalid.count("could not be decoded") == 8


def test_what_is_missing_is_said_in_its_place(tmp_path: Path, images: Path) -> None:
    half = make_cache(tmp_path / "cache", images, skip_shards=[1])
    assert half[0]._repr_html_().count("<img") == 1 + 2 * 4
    assert half[5]._repr_html_().count("not committed") == 8
    moved = FeatureCache.open(half.storage.url, images=str(tmp_path / "nowhere"))
    assert moved[0]._repr_html_().count("<img") == 2 * 4


def test_labelled_arrays_are_the_features(cache: FeatureCache) -> None:
    tree = cache.to_xarray()
    assert set(tree.children) == set(cache.teachers)
    features = tree["alpha/features"]
    assert features.dims == ("sample", "view", "level", "height", "width", "channel")
    assert features.shape == (6, 2, 4, 2, 2, 8)
    assert features.dtype == np.float32
    assert (tree["alpha"].attrs["codec"], tree["alpha"].attrs["pretrained"]) == ("f32", False)
    key, row = cache.key(3), int(cache.index.rows(3, 1))
    for name in cache.teachers:
        expected = cache.read([row])[name].decode()[0].numpy()
        found = tree[f"{name}/features"].sel(sample=key, view=1)
        np.testing.assert_array_equal(found.values, expected)
        np.testing.assert_array_equal(found.sel(level=[4, 2]).values, expected[[3, 1]])
        np.testing.assert_array_equal(
            found.isel(level=-1, height=slice(None, None, -1), channel=2).values, expected[-1, ::-1, :, 2]
        )
    several = features.isel(sample=[5, 0], view=0, level=1)
    rows = cache.index.rows([5, 0], 0)
    np.testing.assert_array_equal(several.values, cache.read(rows)["alpha"].decode()[:, 1].numpy())


def test_labelled_arrays_read_only_what_is_used(tmp_path: Path, images: Path) -> None:
    half = make_cache(tmp_path / "cache", images, skip_shards=[1])
    features = half.to_xarray(["alpha"])["alpha/features"]
    assert np.isfinite(features.isel(sample=slice(0, 3)).mean().item())
    with pytest.raises(IncompleteCacheError):
        features.isel(sample=3).load()
    with pytest.raises(CacheError, match="did you mean alpha"):
        half.to_xarray(["alhpa"])
