"""A recipe that cannot be meant ends with a message that names the key and the nearest known one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cache_builder.recipe import BuildRecipe
from cache_builder.teachers.recipe import TeacherRecipe
from pipeline.errors import RecipeError
from pipeline.recipe import SHIPPED, check_recipe, load_recipe
from student.recipe import TrainRecipe

TEXT = "cache: c\nsource: images\nteachers: [dinov2_small]\nviews: {num_views: 2}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    return path


def test_overrides_reach_into_the_recipe(recipe: Path) -> None:
    loaded = load_recipe(
        BuildRecipe,
        recipe,
        ["views.num_views=4", "teachers=[sam_base,clip]", "source.path=/x", "runner.kind=ray"],
    )
    assert loaded.views.num_views == 4
    assert list(loaded.teachers) == ["sam_base", "clip"]
    assert (loaded.source.path, loaded.source.kind, loaded.runner.kind) == ("/x", "auto", "ray")


def test_null_removes_a_teacher(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "cache: c\nsource: images\nteachers: {a: {model: vit_tiny_patch16_224}, b: {preset: sam_base}}\n"
    )
    assert list(load_recipe(BuildRecipe, path, ["teachers.a=null"]).teachers) == ["b"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("view.num_views=2", r"view: unknown key; did you mean views\?"),
        ("views.num_view=2", r"views.num_view: unknown key; did you mean num_views\?"),
        ("runner.batchsize=2", r"runner.batchsize: unknown key; did you mean batch_size\?"),
        ("teachers.x.codecs=f16", r"teachers.x.codecs: unknown key; did you mean codec\?"),
        ("views.num_views=many", "views.num_views: .*integer.*'many'"),
        ("views.num_views=0", "views.num_views: .*greater than or equal to 1"),
        ("runner.kind=slurm", "runner.kind: .*'local' or 'ray'"),
        ("views.policy=imagenet_eval", "one fixed view"),
        ("noequals", r"must have the form key=value(.|\n)*got: +'noequals'"),
        ("views.size=0", "views: size must be two positive numbers"),
        ("views.scale=[0.5,0.1]", "low <= high"),
    ],
)
def test_what_cannot_be_meant_is_named(recipe: Path, override: str, message: str) -> None:
    overrides = ["teachers={x: {model: vit_tiny_patch16_224}}", override]
    with pytest.raises(RecipeError, match=message):
        load_recipe(BuildRecipe, recipe, overrides)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("cache: c\n")
    with pytest.raises(RecipeError, match="source: this key is needed"):
        load_recipe(BuildRecipe, path)


def test_broken_yaml_is_an_error_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("cache: [1, 2\nsource: x")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(BuildRecipe, path)


def test_an_unknown_recipe_names_the_nearest_shipped_one() -> None:
    with pytest.raises(RecipeError, match="did you mean imagenet1k_vitl"):
        load_recipe(BuildRecipe, "imagenet1k_vit_l")


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_says_how_to_run_it(path: Path) -> None:
    text = path.read_text()
    model = TrainRecipe if "\nstudent:" in text or "\nschedule:" in text else BuildRecipe
    load_recipe(model, path.stem)
    for word in ("Command", "Hardware", "Metric"):
        assert word in text.split("\ncache:")[0], f"the header does not state: {word}"


def test_stage_2_of_the_page_starts_from_a_student_with_the_same_paths() -> None:
    page = (SHIPPED.parents[1] / "docs/recipes.md").read_text()
    commands = [command.split() for command in re.findall(r"`(sak_stage\d_\w+ …[^`{]*)`", page)]
    recipes = [
        load_recipe(TrainRecipe, name, [text.rstrip(",") for text in rest]) for name, _, *rest in commands
    ]
    paths = {f"{r.output}/student": r.student.adapter_paths for r in recipes if r.multitask is None}
    starts = [r.student for r in recipes if r.multitask and r.student.init_from]
    assert False in [student.adapter_paths for student in starts]
    assert [s.init_from for s in starts if s.adapter_paths != paths[str(s.init_from)]] == []


def test_a_listed_timm_model_is_named_without_its_tag() -> None:
    def teachers(value: object) -> dict[str, TeacherRecipe]:
        content = {"source": "/x", "cache": "/y", "teachers": value}
        return check_recipe(BuildRecipe, content, "of this test").teachers

    named = teachers(["dinov2_small", "test_vit.r160_in1k"])
    assert list(named) == ["dinov2_small", "test_vit"]
    assert named["test_vit"].model == "test_vit.r160_in1k"
    with pytest.raises(RecipeError, match="two of these have one name"):
        teachers(["test_vit.a", "test_vit.b"])
    with pytest.raises(RecipeError, match=r"its model may have any name: \{name: \{model: a\.b\}\}"):
        teachers({"a.b": {"model": "test_vit"}})


def test_a_key_of_a_listed_teacher_can_be_overridden() -> None:
    overrides = ["teachers=[dinov2_small]", "teachers.dinov2_small.pretrained=false"]
    recipe = load_recipe(BuildRecipe, "demo", ["source.path=/x", "cache=/y", *overrides])
    assert recipe.teachers["dinov2_small"].pretrained is False
