"""A cache in a notebook: `cache[key]`, and the cache as labelled arrays."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from teachercache import FeatureCache, render_view
from teachercache.pipeline.errors import CacheError, CorruptShardError, UnknownKeyError
from teachercache.pipeline.records.spec import GridSpec
from teachercache.pipeline.units import human_bytes
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
    assert [one.key for one in cache] == cache.samples["key"].to_pylist()
    assert len(cache) == 6
    with pytest.raises(KeyError, match=r"No sample has this key.*\n.*\n.*image_003"):
        cache["image_0033"]
    for wrong in (6, -7):
        with pytest.raises(IndexError):
            cache[wrong]
    with pytest.raises(IndexError):
        sample.features("alpha", view=2)
    with pytest.raises(CacheError, match="could not be decoded"):
        cache[4].features("alpha")


def test_a_sample_by_the_end_of_its_key(cache: FeatureCache) -> None:
    assert cache["<b>"].key == "a/<b>"
    assert cache["_003"].key == "image_003"
    with pytest.raises(UnknownKeyError, match=r"6 samples have keys that end so.*\n.*\n.*<b>, image_001"):
        cache[""]
    with pytest.raises(UnknownKeyError, match="No sample"):
        cache.find("_003", whole=True)


def test_a_notebook_shows_the_whole_cache(cache: FeatureCache, tmp_path: Path, images: Path) -> None:
    assert repr(cache).startswith(f"FeatureCache('{cache.storage.url}': 6 samples × 2 views of ")
    html = cache._repr_html_()
    lines = [re.findall("<td>(.*?)</td>", line) for line in re.findall("<tr>(.*?)</tr>", html)]
    assert [line[0] for line in lines] == [
        "teacher",
        "alpha (random weights)",
        "beta &lt;b&gt; (random weights)",
    ]
    assert lines[1][1:5] == ["4", "2×2", "8", "f32"]
    assert lines[1][7] == "2 of 2 shards"
    assert "6 samples, 2 views, 12 rows" in html
    row = 4 * 2 * 2 * 8 * 4 + 4 + 16  # its values, its checksum and its place in the index
    assert lines[1][5:7] == [f"{row} B", human_bytes(12 * row)]
    half = make_cache(tmp_path / "cache", images, skip_shards=[1])
    assert half._repr_html_().count("1 of 2 shards") == 2


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


def test_labelled_arrays_are_reduced_over_what_can_be_read(tmp_path: Path, images: Path) -> None:
    """Of three shards one has a quarantined sample, one is not committed and one has a damaged record."""
    make_cache(tmp_path / "c", images, num_views=1, samples_per_shard=2, invalid_samples=[1], skip_shards=[1])
    record = tmp_path / "c/commits/alpha/00002.json"
    for text, held in ((record.read_text(), [0, 4, 5]), ("{", [0])):
        record.write_text(text)
        cache = FeatureCache.open(tmp_path / "c")
        tree = cache.to_xarray()
        np.testing.assert_array_equal(np.flatnonzero(tree["alpha/valid"].isel(view=0)), held)
        expected = cache.read(cache.index.rows(held, 0))["alpha"].decode().numpy().mean((0, 2, 3))
        found = tree["alpha/features"].isel(view=0).mean(("sample", "height", "width"))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        assert tree["alpha/features"].isel(sample=1).isnull().all()
        assert np.asarray(tree["beta/valid"]).ravel().tolist() == [True, False, False, False, True, True]
    assert tree["alpha/valid"].sel(sample=cache.key(0), view=0).item() is True


def test_both_ways_give_the_map_of_an_adjoint_grid(tmp_path: Path, images: Path) -> None:
    adjoint = teacher_spec(grid=4).model_copy(update={"grid": GridSpec(kind="adjoint", size=(2, 2))})
    cache = make_cache(tmp_path / "c", images, teachers={"clip": adjoint}, invalid_samples=[4])
    group = cache.to_xarray()["clip"]
    found = np.asarray(group["features"].isel(sample=[3, 4, 0], view=1))
    for place, sample in ((0, 3), (2, 0)):
        np.testing.assert_array_equal(found[place], cache[sample].features("clip", view=1))
    assert np.isnan(found[1]).all()
    assert group.attrs["grid"] == "adjoint"


def test_levels_have_one_name(cache: FeatureCache, tmp_path: Path, images: Path) -> None:
    """Counted from 1, with their blocks as `block_indices` counts."""
    spec = teacher_spec().model_copy(update={"block_indices": (2, 5, 8, 11)})
    other = make_cache(tmp_path / "c", images, teachers={"alpha": spec})
    assert "level 4 (block 11)" in other[0]._repr_html_()
    levels = other.to_xarray()["alpha/features"]
    assert np.array_equal([levels["level"], levels["block"]], [[1, 2, 3, 4], [2, 5, 8, 11]])


def test_random_weights_are_named(cache: FeatureCache, tmp_path: Path, images: Path) -> None:
    assert cache[0]._repr_html_().count("(random weights)") == 2
    spec = teacher_spec().model_copy(update={"pretrained": True})
    assert "random" not in make_cache(tmp_path / "c", images, teachers={"alpha": spec})[0]._repr_html_()


def test_labelled_arrays_read_only_what_is_used(tmp_path: Path, images: Path) -> None:
    half = make_cache(tmp_path / "cache", images, skip_shards=[1])
    features = half.to_xarray(["alpha"])["alpha/features"]
    (tmp_path / "cache/teachers/alpha/codes/c/0/0/0/0/0").write_bytes(b"x")
    assert np.isnan(features.isel(sample=3)).all()
    with pytest.raises(CorruptShardError):
        features.isel(sample=0).load()
    with pytest.raises(CacheError, match="did you mean alpha"):
        half.to_xarray(["alhpa"])
