"""A cache with a margin from its plan to its growth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from teachercache import build
from teachercache.cache_builder.build_recipe import BuildRecipe
from teachercache.cache_builder.builder import prepare
from teachercache.jobs.inspection.summary import summarize
from teachercache.jobs.inspection.tables import plan_table, summary_table
from teachercache.pipeline.errors import CacheMismatchError
from teachercache.pipeline.exploring.map_reader import MapReader
from teachercache.pipeline.verify import verify
from tests.make_cache import build_recipe, make_images

QUIET = Console(quiet=True)
TINY: dict[str, Any] = {"model": "vit_tiny_patch16_224", "pretrained": False, "codec": "f32"}
VIEWS = {"num_views": 2, "size": [32, 32], "margin": 32, "flip": "pairs"}
WORDS = "2 of imagenet_train at 32×32, seed 0, 9 windows of each, stored at 64×64, in pairs of flips"


def printed(table: Any) -> str:
    console = Console(width=200)
    with console.capture() as text:
        console.print(table)
    return text.get()


def test_a_wide_cache_is_planned_built_inspected_verified_and_grown(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 4)

    def recipe(**changes: Any) -> BuildRecipe:
        teachers = {"tiny": TINY | {"grid": "adjoint"}}
        content = {"teachers": teachers, "views": VIEWS, "images": "copy"} | changes
        return build_recipe(tmp_path / "cache", images, **content)

    _, spec, plan = prepare(recipe(), QUIET)
    assert spec.teachers["tiny"].image_size == (64, 64)
    assert spec.teachers["tiny"].stored_grid == (4, 4)
    assert WORDS in printed(plan_table(plan))

    cache = build(recipe(), QUIET).cache
    assert WORDS in printed(summary_table(summarize(cache.storage)))
    assert cache.view(0).size == (64, 64)
    assert (cache.view(0).box, cache.view(0).flip) == (cache.view(1).box, not cache.view(1).flip)
    maps = cache.feature_maps("tiny", cache.index.rows([0], 0))
    assert cache[0].pixels().shape == (64, 64, 3)
    assert cache.to_xarray()["tiny"]["features"].shape[-3:-1] == (4, 4)
    seen = MapReader(cache, window=True)
    assert seen.view(0).shape == (32, 32, 3)
    assert torch.equal(seen.maps("tiny", 0), maps[0, :, 1:3, 1:3])

    for changed in ({"margin": 16}, {"margin": 0}, {"flip": "random"}):
        (key,) = changed
        with pytest.raises(CacheMismatchError, match=rf"views\.{key}: the cache has"):
            build(recipe(views=VIEWS | changed), QUIET)

    more = {"tiny": TINY | {"grid": "adjoint"}, "second": TINY | {"random_seed": 1}}
    grown = build(recipe(views=VIEWS | {"num_views": 4}, teachers=more), QUIET).cache
    assert grown.num_rows == 16
    assert torch.equal(grown.feature_maps("tiny", grown.index.rows([0], 0)), maps)
    assert verify(grown, full=True) == []
