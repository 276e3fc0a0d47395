"""The shipped recipes of caches: they keep what the students' losses need, and their headers are true."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from teachercache.cache_builder.build_recipe import BuildRecipe
from teachercache.cache_builder.plan import bytes_per_row
from teachercache.cache_builder.teachers.registry import passes
from teachercache.cache_builder.teachers.teacher_recipe import (
    resolve_teacher,
    student_grid,
)
from teachercache.jobs.recipes import SHIPPED, find_recipe
from teachercache.pipeline.records.spec import GridSpec, TeacherSpec
from teachercache.pipeline.units import human_bytes
from teachercache.student.training.student_recipe import SakRecipe
from teachercache.student.training.train_recipe import TrainRecipe

CACHES = sorted(path.stem for path in SHIPPED.glob("*_vit[bl]*.yaml") if "kpu" not in path.stem)
STUDENTS = sorted(path.stem for path in SHIPPED.glob("sak_stage*.yaml"))


def teachers(name: str, overrides: Sequence[str] = ()) -> list[TeacherSpec]:
    recipe = find_recipe(BuildRecipe, name, overrides)
    return [resolve_teacher(*item, recipe.views.size, recipe.sak_compat) for item in recipe.teachers.items()]


def mb(specs: Sequence[TeacherSpec]) -> str:
    return human_bytes(sum(map(bytes_per_row, specs)))


def test_there_are_recipes() -> None:
    assert len(CACHES) == 7
    assert len(STUDENTS) == 9


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_stands_on_the_adjoint_of_the_students_grid(name: str) -> None:
    grid = student_grid(find_recipe(BuildRecipe, name).views.size)
    assert {spec.grid for spec in teachers(name)} == {GridSpec(kind="adjoint", size=grid)}
    header = (SHIPPED / f"{name}.yaml").read_text()
    assert f"one student grid: {grid[0]}×{grid[1]}" in header


@pytest.mark.parametrize("name", [name for name in CACHES if "4bit" not in name])
def test_a_header_says_how_to_have_native_grids(name: str) -> None:
    header = " ".join(line.lstrip("# ") for line in (SHIPPED / f"{name}.yaml").read_text().splitlines())
    overrides = re.findall(r"teachers\.\w+\.grid=native|views\.policy=\w+_eval|views\.num_views=1", header)
    native = teachers(name, overrides)
    assert {spec.grid for spec in native} == {GridSpec()}
    assert max(spec.native_grid for spec in native) > student_grid(find_recipe(BuildRecipe, name).views.size)
    sizes = re.search(r"native grids, ([\d.]+ MB) a view instead of ([\d.]+):", header)
    assert sizes is not None
    assert (sizes[1], f"{sizes[2]} MB") == (mb(native), mb(teachers(name)))


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_fits_its_cache(name: str) -> None:
    recipe = find_recipe(TrainRecipe, name)
    assert Path(recipe.cache).name in CACHES
    assert recipe.student.stem is not None
    assert "patch16" in recipe.student.stem  # an adjoint holds for the grid of patches of 16 alone
    assert recipe.distillation.cosine == "flattened"  # exact


@pytest.mark.parametrize("name", [*CACHES, *STUDENTS])
def test_a_recipe_of_sak_feeds_its_models_as_the_authors_do_and_says_what_differs(name: str) -> None:
    if name in STUDENTS:
        student = find_recipe(TrainRecipe, name).student
        assert isinstance(student, SakRecipe)
        assert student.sak_compat
    else:
        dinov2, clip, sam = teachers(name)
        assert {(spec.mean, spec.std) for spec in (dinov2, clip, sam)} == {
            (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        }
        size = find_recipe(BuildRecipe, name).views.size
        assert dinov2.image_size == clip.image_size == size
        assert dinov2.native_grid == {384: (27, 27), 512: (36, 36), 448: (32, 41)}[size[0]]
        assert (sam.image_size, sam.native_grid) == ((1024, 1024), (64, 64))
    header, _, _ = (SHIPPED / f"{name}.yaml").read_text().partition("\ncache:")
    assert "# Differs   from the paper: " in header


def test_a_kpu_s_cache_holds_the_last_level_and_class_tokens() -> None:
    of_clip, of_detector = (Path(one.cache).name for one in find_recipe(TrainRecipe, "kpu_base").each)
    for name, cheaper in ((of_clip, False), ("imagenet1k_kpu_vitb", True)):
        clip, *others = teachers(name)
        assert (clip.block_indices, clip.cls_token, clip.grid) == ((11,), True, GridSpec())
        assert [(one.num_levels, one.cls_token, one.grid) for one in others] == [
            (1, False, GridSpec())
        ] * cheaper
        header = (SHIPPED / f"{name}.yaml").read_text()
        assert f"{mb([clip, *others])} a view" in header
        *_, sentinel = teachers(name, re.findall(r"teachers\.dinov2\.\S+", header))
        assert (sentinel.block_indices, sentinel.cls_token) == ((11,), True)
    maps = teachers(of_detector)
    assert [one.native_grid[0] for one in maps] == [100, 50, 25, 13]
    assert len(passes({str(one.block_indices): one for one in maps})) == 1
    assert f"{mb(maps)} a view" in (SHIPPED / f"{of_detector}.yaml").read_text()


def test_the_recipe_of_kpu_is_that_of_the_paper() -> None:
    recipe = find_recipe(TrainRecipe, "kpu_base")
    assert (recipe.student.kind, recipe.distillation.cosine) == ("kpu", "token")
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay, recipe.schedule.kind) == (
        2e-4,
        0.05,
        "cosine",
    )
    assert recipe.schedule.steps(1_281_167 / recipe.images_per_step(8)) == (40_000, 0)
    assert [one.batch_size_per_process for one in recipe.each] == [32, 4]
    loss = recipe.distillation
    weights = loss.image_weight, loss.cosine_weight, loss.distance_weight, loss.reconstruction_weight
    assert weights == (1, 0.9, 0.1, 1)
