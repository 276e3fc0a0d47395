"""Tars that commands print, fetched through webdataset."""

from __future__ import annotations

from pathlib import Path

import pytest

from teachercache import FeatureCache
from teachercache.cache_builder.draft import draft
from teachercache.pipeline.errors import SourceError
from teachercache.pipeline.places.own_places import is_followed
from teachercache.pipeline.records.tables import dataset_fingerprint
from teachercache.pipeline.sources import open_source
from tests.images import encode, photo, tar_bytes, write_folder
from tests.make_cache import build_recipe, make_cache, make_images

JPEG = encode(photo(), "JPEG")
TARS = {f"set-{n}.tar": tar_bytes([(f"{n}{i}.jpg", JPEG) for i in range(2)]) for n in range(2)}


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches"


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "tars", TARS)


def test_piped_tars_are_the_same_images(tmp_path: Path, tars: Path) -> None:
    piped = open_source(f"pipe:cat {tars}/set-{{0..1}}.tar")
    samples = piped.scan()
    assert samples["key"].to_pylist() == ["00", "01", "10", "11"]
    assert dataset_fingerprint(samples) == dataset_fingerprint(open_source(tars).scan())
    row = samples.slice(3, 1).to_pylist()[0]
    assert piped.read(row["path"], row["offset"], row["nbytes"]) == JPEG


def test_each_tar_is_fetched_once(tmp_path: Path, tars: Path) -> None:
    location = f"pipe:echo >>{tmp_path}/ran; cat {tars}/set-0.tar"
    for _ in range(2):
        spec = draft(build_recipe(tmp_path / "cache", location)).spec
    assert (spec.dataset.location, spec.dataset.num_samples) == (location, 2)
    assert (tmp_path / "ran").read_text() == "\n"


@pytest.mark.parametrize("command", ["head -c 3000 {}", "cat {}; exit 3", "head -c 0 {}"])
def test_a_stream_that_ends_early_names_its_tar_and_leaves_none(
    tars: Path, caches: Path, command: str
) -> None:
    location = "pipe:" + command.format(f"{tars}/set-{{0..1}}.tar")
    with pytest.raises(SourceError, match=r"stream of pipe:.*set-0\.tar.* ends early(.|\n)*try the command"):
        open_source(location)
    assert [path for path in caches.rglob("*") if path.is_file()] == []


def test_a_cache_runs_no_command(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 2)
    cache = make_cache(tmp_path / "cache", images)
    for location in (f"pipe:touch {tmp_path}/ran", f"file://pipe:touch {tmp_path}/ran"):
        dataset = cache.spec.dataset.model_copy(update={"location": location})
        strange = FeatureCache(cache.storage, cache.spec.changed(dataset=dataset))
        with pytest.raises(SourceError):
            strange.image(0)
    assert not is_followed("pipe:true", "/data/cache")
    assert not (tmp_path / "ran").exists()
