"""A cache opens at its root, as one Zarr hierarchy, and without our code."""

from __future__ import annotations

import json
import shutil
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
import zarr
from xarray.backends import plugins

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.rearranging.subset import subset
from teachercache.pipeline.verify import strays, verify
from tests.make_cache import make_cache, make_images, teacher_spec

ROOT = ("zarr.json", "teachers/zarr.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    teachers = {
        "alpha": teacher_spec(cls_token=True),
        "beta": teacher_spec(width=256, grid=3, codec="bf16"),
    }
    make_cache(folder / "cache", make_images(folder / "images", 4), teachers=teachers)
    return folder / "cache"


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "cache"))


def test_zarr_lists_it_without_a_warning(made: Path) -> None:
    root: Any = zarr.open(made, mode="r")
    listed = {name: getattr(one, "shape", None) for name, one in root.members(max_depth=None)}
    assert listed == {
        "teachers": None,
        "teachers/alpha": None,
        "teachers/alpha/codes": (12, 4, 2, 2, 8),
        "teachers/alpha/cls": (12, 4, 8),
        "teachers/beta": None,
        "teachers/beta/codes": (12, 4, 3, 3, 256),
    }
    expected = FeatureCache.open(made).read([3])["alpha"].decode().numpy()
    np.testing.assert_array_equal(root["teachers/alpha/codes"][3:4], expected)
    teachers: Any = zarr.open(made / "teachers", mode="r")
    assert sorted(teachers.group_keys()) == ["alpha", "beta"]


def test_xarray_opens_every_teacher(made: Path) -> None:
    with xarray.open_datatree(made, engine="zarr") as tree:
        codes = tree["teachers/alpha/codes"]
        assert codes.dims == ("row", "level", "height", "width", "channel")
        assert tree["teachers/beta"].attrs["teacher"]["codec"] == "bf16"
        expected = FeatureCache.open(made).read([3])["alpha"].decode().numpy()
        np.testing.assert_array_equal(codes.isel(row=[3]), expected)


@pytest.mark.filterwarnings("error")
def test_xarray_knows_a_cache_by_its_files(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the package is installed; here, by its entry point alone."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    [(name, value)] = project["entry-points"]["xarray.backends"].items()
    backend = EntryPoint(name, value, "xarray.backends").load()()
    engines = plugins.list_engines() | {name: backend}
    monkeypatch.setattr(plugins, "list_engines", lambda: engines)
    with xarray.open_datatree(made) as tree:
        assert tree["teachers/alpha/codes"].shape == (12, 4, 2, 2, 8)
    with xarray.open_dataset(str(made), group="teachers/beta") as arrays:
        assert arrays["codes"].shape == (12, 4, 3, 3, 256)
    assert not backend.guess_can_open(made / "teachers")
    assert not backend.guess_can_open("s3://bucket/cache")


def test_the_root_repeats_what_the_arrays_say(made: Path) -> None:
    repeated = json.loads((made / "zarr.json").read_text())["consolidated_metadata"]["metadata"]
    below = {path.parent.relative_to(made): path for path in made.rglob("zarr.json")}
    del below[Path()]
    assert repeated == {str(name): json.loads(path.read_text()) for name, path in below.items()}


def test_a_cache_without_them_is_sound(cache: Path) -> None:
    opened = FeatureCache.open(cache)
    assert verify(opened, full=True) == [] == strays(opened)
    for name in ROOT:
        (cache / name).unlink()
    assert verify(opened, full=True) == [] == strays(opened)


@pytest.mark.parametrize("name", ROOT)
def test_one_that_says_another_thing_is_found_and_mended(cache: Path, name: str) -> None:
    from teachercache.cache_builder.repair import repair

    sound = (cache / name).read_bytes()
    (cache / name).write_bytes(sound.replace(b'"attributes": {}', b'"attributes": {"a": 1}'))
    assert [problem.file for problem in verify(FeatureCache.open(cache))] == [name]
    repaired = repair(FeatureCache.open(cache))
    assert ([problem.file for problem in repaired.mended], repaired.left) == ([name], [])
    assert (cache / name).read_bytes() == sound


def test_a_cache_of_fewer_teachers_names_those(cache: Path, tmp_path: Path) -> None:
    subset(str(cache), str(tmp_path / "less"), teachers=["beta"]).run()
    root: Any = zarr.open(tmp_path / "less", mode="r")
    assert list(root["teachers"].group_keys()) == ["beta"]
