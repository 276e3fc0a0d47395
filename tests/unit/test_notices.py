"""What a run says at its start, and when it has nothing to say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from teachercache.pipeline.records.spec import CacheSpec, GridSpec
from teachercache.pipeline.records.view_policy import ViewPolicy
from teachercache.student.training.preflight import notices
from teachercache.student.training.train import train
from tests.make_cache import make_cache, make_images, teacher_spec
from tests.train_recipes import train_recipe

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
ADJOINT = teacher_spec(grid=5).model_copy(update={"grid": GridSpec(kind="adjoint", size=(2, 2))})
COARSE = teacher_spec(grid=1).model_copy(update={"grid": GridSpec(kind="adjoint", size=(2, 2))})


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> CacheSpec:
    folder = tmp_path_factory.mktemp("cache")
    teachers = {"fine": ADJOINT, "coarse": COARSE, "native": teacher_spec()}
    return make_cache(folder / "cache", make_images(folder / "images", 3), teachers=teachers).spec


@pytest.mark.parametrize(
    ("distillation", "cached", "told"),
    [
        ({}, ["fine"], "On the adjoint grid of fine smooth-L1 is an approximation"),
        ({"cosine": "token"}, ["fine"], "smooth-L1 and the cosine of tokens are approximations"),
        ({"cosine": "token", "distance": "squared_error"}, ["fine"], "the cosine of tokens is"),
        ({"distance": "squared_error"}, ["fine"], ""),
        ({"distance_weight": 0}, ["fine"], ""),
        ({}, ["coarse", "native"], ""),
        ({}, [], ""),
    ],
)
def test_an_approximation_is_said(
    spec: CacheSpec, distillation: dict[str, Any], cached: list[str], told: str
) -> None:
    found = notices(train_recipe("cache", "run", distillation=distillation), spec, cached)
    assert len(found) == bool(told)
    assert told in "".join(found)


@pytest.mark.parametrize("policy", ["imagenet_train", "multitask_train", "multitask_eval"])
def test_views_that_are_not_of_stage_2_are_said(spec: CacheSpec, policy: Any) -> None:
    recipe = train_recipe("cache", "run", multitask={"dataset": {"kind": "scenes", "root": "."}})
    seen = spec.model_copy(update={"views": ViewPolicy(policy=policy, size=(32, 32))})
    assert notices(recipe, seen, []) == (
        [
            "The cache has imagenet_train views: labels are learnt on those, and not on the ones of stage 2,"
            " multitask_train."
        ]
        if policy == "imagenet_train"
        else []
    )


def test_a_run_says_it_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_cache(tmp_path / "cache", make_images(tmp_path / "images", 4), teachers={"fine": ADJOINT})
    train(train_recipe(tmp_path / "cache", tmp_path / "run", schedule={"max_steps": 1}))
    assert capsys.readouterr().out.count("On the adjoint grid of fine smooth-L1 is an approximation") == 1
