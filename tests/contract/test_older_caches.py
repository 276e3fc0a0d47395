"""A cache that an earlier version wrote (goldens/cache_v2.tar.gz): it opens, verifies, and goes on as it is.

Made of six photographs of 64×48, one of them cut, two views each, with `images: copy` and `int4-hadamard`.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import xxhash
from rich.console import Console

from teachercache import FeatureCache, build
from teachercache.pipeline.verify import strays, verify
from tests.make_cache import build_recipe

GOLDEN = Path(__file__).parents[1] / "goldens" / "cache_v2.tar.gz"
TEACHERS = {"tiny": {"model": "vit_tiny_patch16_224", "pretrained": False, "codec": "int4-hadamard"}}
ROWS = [0, 1, 6, 9]
REWRITTEN = {"cache.json", "samples.parquet", "views.parquet"}  # and zarr.json: they grow


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    with tarfile.open(GOLDEN) as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path / "cache"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_it_opens_verifies_and_reads(cache: Path) -> None:
    opened = FeatureCache.open(cache, checksums=True)
    assert opened.spec.cache_id == "feb904f8c23eae4bbcc6740204294dba"
    assert verify(opened, full=True) == [] == strays(opened)
    codes = opened.read(ROWS)["tiny"].tensors()["codes"].numpy()
    assert xxhash.xxh3_128_hexdigest(codes.tobytes()) == "f25cfadc2f9a1367e9964abe001eb2e4"
    decoded = opened.read(ROWS)["tiny"].decode().numpy()
    assert np.abs(decoded).mean() == pytest.approx(0.2790099, rel=1e-5)
    assert opened.views.view(3).box == (5.0, 1.0, 42.0, 47.0)
    assert opened.image(0).size == (64, 48)


def test_it_grows_and_what_was_there_stays_byte_for_byte(cache: Path) -> None:
    before = contents(cache)
    recipe = build_recipe(
        cache,
        cache.parent / "photographs",
        images="copy",
        teachers=TEACHERS,
        views={"num_views": 3, "size": 32},
    )
    assert build(recipe, Console(quiet=True)).shards == 1
    after = contents(cache)
    for name, data in before.items():
        if name not in REWRITTEN and not name.endswith("zarr.json"):
            assert after[name] == data, name
    assert {"zarr.json", "teachers/zarr.json"} <= after.keys() - before.keys()
    grown = FeatureCache.open(cache)
    assert verify(grown, full=True) == [] == strays(grown)
    old, new = grown.spec.segments
    assert (old.views_hash, grown.spec.num_rows) == (None, 18)  # what nobody checked is not vouched for
    assert new.views_hash
    assert FeatureCache.open(cache).read(ROWS)["tiny"].tensors()["codes"].shape[0] == len(ROWS)


def test_views_that_its_policy_does_not_draw_are_found(cache: Path) -> None:
    opened = FeatureCache.open(cache)
    table = opened.manifest.views(opened.spec)
    moved = table.set_column(2, "left", table["right"]).set_column(4, "right", table["left"])
    opened.manifest.write_table("views.parquet", moved)
    (problem,) = verify(FeatureCache.open(cache), full=True)
    assert "is not what the view policy draws" in problem.reason
