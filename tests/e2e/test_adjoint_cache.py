"""Training from a cache on the adjoint grid, as the shipped recipes build it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from rich.console import Console

from teachercache import build
from teachercache.pipeline.errors import RecipeError
from teachercache.student.datasets.scenes import write_scenes
from teachercache.student.training.train import train
from tests.make_cache import build_recipe
from tests.train_recipes import CONTENT, logged, train_recipe

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, train=4, val=1, size=(40, 56))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    """A teacher whose own grid, 6×9, is finer than the student's 2×3."""
    folder = tmp_path_factory.mktemp("cache") / "cache"
    teacher = {"model": "test_vit", "pretrained": False, "codec": "f32", "image_size": [96, 144]}
    views = {"policy": "multitask_train", "num_views": 2, "size": [32, 48]}
    teachers = {"fine": teacher | {"grid": "adjoint"}}
    build(build_recipe(folder, scenes / "images/train", teachers=teachers, views=views), Console(quiet=True))
    return folder


@pytest.mark.parametrize(("distance", "exact_steps"), [("squared_error", 8), ("smooth_l1", 1)])
def test_it_trains_as_the_native_map_does(
    cache: Path, tmp_path: Path, distance: str, exact_steps: int
) -> None:
    """`features: online` compares with the teacher's map on its own 6×9 grid. Smooth-L1 is approximated, so
    a second step starts elsewhere."""
    found = []
    for features in ("cached", "online"):
        output = tmp_path / features
        train(train_recipe(cache, output, features=features, distillation={"distance": distance}))
        AcceleratorState._reset_state(reset_partial_state=True)
        cosines = [logged(output, f"cosine/fine/level{level}")[:exact_steps] for level in range(4)]
        found.append((np.array(cosines), logged(output)))
    (cached_cosines, cached), (online_cosines, online) = found
    assert cached_cosines == pytest.approx(online_cosines, rel=1e-4)
    assert cached == pytest.approx(online, rel=1e-4 if distance == "squared_error" else 0.1)


def test_heads_refuse_it_as_features(cache: Path, scenes: Path, tmp_path: Path) -> None:
    changes = {
        "student": CONTENT["student"] | {"kind": "amalgam", "stem": None, "fusion": "sum"},
        "multitask": {"dataset": {"kind": "scenes", "root": str(scenes)}},
        "distillation": {"weight": 0},
    }
    with pytest.raises(RecipeError, match="grid: native"):
        train(train_recipe(cache, tmp_path, **changes))
