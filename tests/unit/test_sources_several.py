"""Several sources as one: keys by name, growth, places that moved, and what cannot be."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from rich.console import Console

from teachercache import build
from teachercache.cache_builder.build_recipe import BuildRecipe
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import SourceError, SourceNotFoundError
from teachercache.pipeline.records.tables import dataset_fingerprint
from teachercache.pipeline.sources import open_source
from tests.make_cache import build_recipe, make_images

TINY = {"tiny": {"model": "test_vit", "pretrained": False, "codec": "f32", "image_size": 32}}


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Path]:
    """A folder, and a tar with images of the same names."""
    folder = make_images(tmp_path / "photos", 4)
    others = make_images(tmp_path / "others", 3, seed=1)
    with tarfile.open(tmp_path / "part.tar", "w") as tar:
        for image in sorted(others.rglob("*.*")):
            tar.add(image, image.name)
    return {"photos": folder, "shards": tmp_path / "part.tar"}


def recipe(cache: Path, source: list[dict[str, str]]) -> BuildRecipe:
    small = build_recipe(cache, "", teachers=TINY, views={"num_views": 1, "size": [32, 32]})
    return BuildRecipe.model_validate(small.model_dump(mode="json", exclude_unset=True) | {"source": source})


def test_keys_and_bytes_are_those_of_each_source_behind_its_name(parts: dict[str, Path]) -> None:
    together = open_source(json.dumps({name: str(path) for name, path in parts.items()}), "several")
    samples = together.scan()
    assert samples["key"].to_pylist() == sorted(samples["key"].to_pylist())
    for name, path in parts.items():
        alone = open_source(path)
        rows = {row["key"]: row for row in samples.to_pylist()}
        expected = alone.scan().to_pylist()
        assert expected
        for row in expected:
            found = rows.pop(f"{name}/{row['key']}")
            assert {**found, "key": row["key"], "path": row["path"]} == row
            place = found["path"], found["offset"], found["nbytes"]
            assert together.read(*place) == alone.read(row["path"], row["offset"], row["nbytes"])
    kinds = {name: one["kind"] for name, one in json.loads(together.location).items()}
    assert kinds == {"photos": "image_folder", "shards": "webdataset"}
    assert together.listing() == open_source(together.location, "several").listing()


def test_a_cache_of_several_sources_grows_by_each_and_finds_those_that_moved(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    source = [{"name": name, "path": str(path)} for name, path in parts.items()]
    wanted = recipe(tmp_path / "cache", source)
    first = build(wanted, Console(quiet=True)).cache
    assert first.num_samples == 7
    image = sorted(parts["photos"].rglob("*.*"))[0]
    image.with_name(f"zz_new{image.suffix}").write_bytes(sorted(parts["photos"].rglob("*.*"))[1].read_bytes())
    grown = build(wanted, Console(quiet=True)).cache
    new = set(grown.samples["key"].to_pylist()) - set(first.samples["key"].to_pylist())
    assert len(new) == 1
    assert new.pop().startswith("photos/")
    assert grown.samples["key"].to_pylist()[:7] == first.samples["key"].to_pylist()
    assert dataset_fingerprint(grown.samples) == grown.spec.dataset.fingerprint
    index = grown.find("shards/image_000", whole=True)
    expected = grown.image_bytes(index)
    (tmp_path / "elsewhere").mkdir()
    moved = parts["shards"].rename(tmp_path / "elsewhere" / "part.tar")
    with pytest.raises(SourceNotFoundError, match="no longer where"):
        FeatureCache.open(tmp_path / "cache").image_bytes(index)
    places = json.dumps({"photos": str(parts["photos"]), "shards": str(moved)})
    assert FeatureCache.open(tmp_path / "cache", images=places).image_bytes(index) == expected


@pytest.mark.parametrize(
    "location", ["/data", "[]", "{}", '{"a/b": "/data"}', '{"a": {"path": 1}}', '{"": "x"}']
)
def test_a_location_that_names_no_sources_is_refused(location: str) -> None:
    with pytest.raises(SourceError, match="several sources"):
        open_source(location, "several")


def test_sources_of_a_recipe_have_different_names(tmp_path: Path) -> None:
    same = [{"name": "a", "path": "x"}, {"name": "a", "path": "y"}]
    for source in (same, [{"path": "x"}], []):
        with pytest.raises(ValueError, match="name"):
            recipe(tmp_path, source)
