"""What a recipe and a cache ask of each other: all of it at once, before anything heavy is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from typer.testing import CliRunner

from teachercache import build_student
from teachercache.jobs.cli import app
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import IncompleteCacheError, RecipeError, TeacherCacheError
from teachercache.pipeline.recipe_files import check_recipe
from teachercache.pipeline.records.spec import GridSpec
from teachercache.student.models.stem import Stem
from teachercache.student.training.preflight import preflight
from teachercache.student.training.student_recipe import KpuRecipe
from teachercache.student.training.train import train
from teachercache.student.training.train_recipe import Tracker, TrainRecipe, ValidationRecipe, run_identity
from tests.make_cache import make_cache, make_images, teacher_spec
from tests.train_recipes import CONTENT, train_recipe

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
FIVE = teacher_spec().model_copy(update={"block_indices": (0, 1, 2, 3, 4)})
ADJOINT = teacher_spec(grid=5).model_copy(update={"grid": GridSpec(kind="adjoint", size=(2, 2))})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of five levels, and one on an adjoint grid whose second shard is missing."""
    folder = tmp_path_factory.mktemp("cache")
    teachers = {"five": FIVE, "adjoint": ADJOINT}
    make_cache(folder / "cache", make_images(folder / "images", 10), teachers=teachers, skip_shards=[1])
    return folder / "cache"


def wrong(cache: Path, **changes: Any) -> TrainRecipe:
    """A recipe with a problem of the stem, of a weight and of each teacher."""
    student = {"stem": "vit_tiny_patch14_224"}
    return train_recipe(
        cache, cache.parent / "run", student=student, distillation={"teacher_weights": {"fife": 2}}, **changes
    )


ASKED = ("timm has no model", "did you mean five", "5 levels in the cache", "shards missing")


def test_every_problem_is_listed_and_nothing_is_made(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("no weights are loaded for a run that cannot start")

    monkeypatch.setattr("teachercache.student.training.train.first_student", load)
    with pytest.raises(RecipeError) as error:
        train(wrong(cache))
    assert "There are 4 problems" in str(error.value)
    assert all(problem in str(error.value) for problem in ASKED)
    assert not (cache.parent / "run").exists()


def test_a_dry_run_lists_what_the_run_does(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(wrong(cache).model_dump(mode="json")))
    done = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml"), "--dry-run"])
    with pytest.raises(RecipeError) as error:
        train(wrong(cache))
    assert isinstance(done.exception, RecipeError)
    assert str(done.exception) == str(error.value)
    assert done.exit_code == 1
    assert "On the adjoint grid of adjoint smooth-L1" in " ".join(done.output.split())


def test_before_there_is_a_cache_its_spec_is_asked(cache: Path) -> None:
    spec = FeatureCache.open(cache).spec
    found = preflight(wrong(cache), spec)
    asked = " ".join(map(str, found.problems))
    assert [text in asked for text in ASKED] == [True, True, False, False]
    assert "5 levels in the cache" in found.notices[0], "the build may still be told otherwise"


def test_a_dry_run_plans_an_amalgam_whose_cache_is_not_built() -> None:
    """The shipped recipe stores adjoint grids, which the build of such a cache is told not to."""
    keys = "student.kind=amalgam student.stem=null student.fusion=sum student.init_from=null teachers=[clip]"
    command = ["train", "sak_stage2_pascal_base", "--dry-run", *keys.split(), "distillation.weight=0"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "those of clip are not in the cache" in done.output
    assert "GPU-" in done.output


def test_one_problem_is_raised_as_it_is(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(IncompleteCacheError, match="adjoint: 1 of 4 shards missing"):
        train(train_recipe(cache, tmp_path, teachers=["adjoint"]))


def test_no_weights_are_asked_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stem is built on the device "meta", where a model of any size takes no memory."""
    made: list[tuple[bool, str]] = []
    build = Stem.__init__

    def noted(stem: Stem, name: str, size: Any, pretrained: bool = False, *rest: Any, **options: Any) -> None:
        build(stem, name, size, pretrained, *rest, **options)
        made.append((pretrained, next(stem.parameters()).device.type))

    monkeypatch.setattr(Stem, "__init__", noted)
    for kind in ("sak", "kpu"):
        student = {"kind": kind, "stem": "test_vit", "pretrained": True}
        preflight(train_recipe(cache, "run", student=student), FeatureCache.open(cache).spec)
    assert made == [(False, "meta")] * 2


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"preservation": True}, "a student of kind sak has no preservation: leave it out"),
        ({"kind": "kpu", "reduction": 4}, "a student of kind kpu has no reduction: leave it out"),
        ({"kind": "kpu", "lora_rnk": 4}, r"student\.lora_rnk: unknown key; did you mean lora_rank\?"),
        ({"kind": "kpu", "lora_rank": 0}, r"student\.lora_rank: Input should be greater"),
        ({"stem": None}, "student: only an amalgam can be without a stem"),
        ({"kind": "kpo"}, "'sak', 'kpu', 'amalgam'"),
    ],
)
def test_a_key_that_a_student_does_not_have_is_named(student: dict[str, Any], message: str) -> None:
    content = CONTENT | {"cache": "cache", "output": "run", "student": student}
    with pytest.raises(RecipeError, match=message):
        check_recipe(TrainRecipe, content, "of this test")


def test_null_leaves_out_a_key_of_another_kind() -> None:
    student = {"kind": "kpu", "stem": "test_vit", "reduction": None, "sak_compat": None}
    assert train_recipe("cache", "run", student=student).student == KpuRecipe(stem="test_vit")


@pytest.mark.parametrize(
    ("kind", "option"), [("sak", "preservation"), ("kpu", "fusion"), ("amalgam", "reduction")]
)
def test_an_option_of_another_kind_is_refused(kind: str, option: str) -> None:
    options: dict[str, Any] = {option: True, "teacher_dims": {"a": 8}, "image_size": (32, 32)}
    with pytest.raises(RecipeError, match=rf"kind {kind} does not have(.|\n)*got: +{option}\n"):
        build_student(kind, stem="test_vit", **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make_cache(folder / "cache", make_images(folder / "images", 4), teachers={"alpha": teacher_spec()})
    return folder / "cache"


def test_images_to_validate_on_that_are_trained_on_are_counted(whole: Path, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 3, seed=1)
    shutil.copy(next((whole.parent / "images").iterdir()), images / "known.jpg")
    make_cache(tmp_path / "other", images, teachers={"alpha": teacher_spec()}, num_views=1)
    recipe = train_recipe(whole, tmp_path / "run", validation={"cache": str(tmp_path / "other")})
    cache = FeatureCache.open(whole)
    notices = preflight(recipe, cache.spec, cache).notices
    assert [notice for notice in notices if notice.startswith("But 1 of the images in ")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teachers": {"beta": teacher_spec()}}, r"got: +teachers: beta\n.*teachers: alpha\n"),
        ({"teachers": {"alpha": teacher_spec(codec="f16")}}, r"alpha\.codec: f16\n.*alpha\.codec: f32\n"),
        ({"view_size": (48, 48)}, r"views\.size: \(48, 48\)\n.*views\.size: \(32, 32\)\n"),
        ({"seed": 0}, "images: 3, all of them trained on"),
        ({"skip_shards": [0]}, "not complete(.|\n)*alpha: 1 of 1 shards missing"),
    ],
)
def test_a_cache_to_validate_on_differs_in_its_images_alone(
    whole: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    images = make_images(tmp_path / "images", 3, seed=changes.pop("seed", 1))
    usual: dict[str, Any] = {"teachers": {"alpha": teacher_spec()}, "num_views": 1}
    make_cache(tmp_path / "other", images, **usual | changes)
    recipe = train_recipe(whole, tmp_path / "run", validation={"cache": str(tmp_path / "other")})
    with pytest.raises(TeacherCacheError, match=message) as error:
        train(recipe)
    assert not (tmp_path / "run").exists()
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    done = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml"), "--dry-run"])
    assert str(done.exception) == str(error.value)


def test_what_is_validated_and_followed_is_said_before(whole: Path, tmp_path: Path) -> None:
    validation = {"fraction": 0.001, "every_steps": 5}
    recipe = train_recipe(whole, tmp_path / "run", validation=validation, trackers=["comet_ml", "aim"])
    with pytest.raises(RecipeError) as error:
        train(recipe)
    for text in (
        "There are 3 problems",
        "too small to hold a sample",
        "pip install 'comet_ml'",
        "pip install 'aim<4'",
    ):
        assert text in str(error.value)
    with pytest.raises(RecipeError, match="nowhere"):
        train(train_recipe(whole, tmp_path / "run", validation={"cache": "nowhere"}, teachers=["alhpa"]))
    on_labels = {"multitask": {"dataset": {"kind": "scenes", "root": "."}}, "teachers": []}
    with pytest.raises(ValueError, match="validation compares with teachers"):
        train_recipe(whole, "run", validation=validation, **on_labels)


def test_every_tracker_of_accelerate_can_be_named() -> None:
    assert set(get_args(Tracker)) == set(LOGGER_TYPE_TO_CLASS)


GOLDENS = json.loads((Path(__file__).parents[1] / "goldens/run_identities.json").read_text())


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: str(golden["identity"]["student.kind"]))
def test_a_run_is_what_its_checkpoints_say(golden: dict[str, Any]) -> None:
    """They were written when every student stated the keys of every kind."""
    recipe = TrainRecipe.model_validate(golden["recipe"])
    identity = run_identity(recipe, golden["facts"])
    assert {key: identity.get(key) for key in golden["identity"]} == golden["identity"]
    new = identity.keys() - golden["identity"].keys()
    assert [identity[key] for key in new if identity[key] is not None] == [], "as if it were not stated"
    assert not [key for key in identity if key.startswith(("validation", "trackers"))]
    aside = {"validation": ValidationRecipe(cache="other"), "trackers": ("wandb",)}
    assert run_identity(recipe.model_copy(update=aside), golden["facts"]) == identity
    held_out = recipe.model_copy(update={"validation": ValidationRecipe(fraction=0.1)})
    assert run_identity(held_out, golden["facts"]) == identity | {"validation.fraction": 0.1}


def test_a_build_lists_every_teacher_that_cannot_be(tmp_path: Path) -> None:
    keys = ["source.path=/no/such/folder", f"cache={tmp_path / 'cache'}", "teachers=[dinov2_smal,sam_bsae]"]
    texts = {}
    for verb in (["plan"], ["build", "--dry-run"]):
        done = CliRunner().invoke(app, [verb[0], "demo", *verb[1:], *keys])
        assert isinstance(done.exception, TeacherCacheError)
        assert done.exit_code == 1
        texts[verb[0]] = str(done.exception)
    assert texts["plan"] == texts["build"]
    assert "There are 3 problems" in texts["plan"]
    assert all(text in texts["plan"] for text in ("dinov2_small", "sam_base", "/no/such/folder"))


def test_a_dry_run_of_a_build_says_what_does_not_fit(tmp_path: Path) -> None:
    make_images(tmp_path / "images", 3)
    keys = [f"source.path={tmp_path / 'images'}", f"cache={tmp_path / 'cache'}", "budget=1kB"]
    keys += ["teachers={tiny: {model: vit_tiny_patch16_224, pretrained: false}}"]
    done = CliRunner().invoke(app, ["build", "demo", "--dry-run", *keys])
    assert "larger than its budget" in str(done.exception)
    assert done.exit_code == 1
