"""`teachercache distill`, stopped twice: the same command goes on. What stands in its way is said first."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from typer.testing import CliRunner, Result

from teachercache import FeatureCache, distill
from teachercache.cache_builder.build_recipe import BuildRecipe
from teachercache.cache_builder.progress import BuildProgress
from teachercache.jobs.cli import app
from teachercache.jobs.distill import choose_recipes
from teachercache.jobs.recipes import find_recipe
from teachercache.pipeline.errors import (
    CacheMismatchError,
    EmptySourceError,
    RecipeError,
    WeightsNotFoundError,
)
from teachercache.pipeline.places.local_storage import LocalStorage
from teachercache.student.training.run_log import RunLog
from teachercache.student.training.train_recipe import TrainRecipe
from tests.images import encode, photo, write_folder
from tests.train_recipes import forget_accelerate, logged

IMAGES = 8
BUILD = ["teachers={tiny: {model: test_vit, grid: adjoint}}", "views.size=[32,32]", "rows_per_shard=2"]
TRAIN = ["student.stem=test_vit", "schedule.max_steps=24"]
SMALL = [
    *(word for key in BUILD for word in ("--build", key)),
    *(word for key in TRAIN for word in ("--train", key)),
]


def teachercache(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


def write_photos(folder: Path, count: int = IMAGES) -> Path:
    """All of other sizes, in folders of folders of folders."""
    files = {
        f"{'abc'[i % 3]}/{i % 2}/x/{i}.jpg": encode(photo(40 + 7 * i, 90 - 5 * i, i)) for i in range(count)
    }
    return write_folder(folder, files)


class Runs(NamedTuple):
    """The results of the same command, stopped in the build, stopped in the training, and not stopped."""

    photos: Path
    shards: int
    building: Result
    training: Result
    finished: Result


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    photos = write_photos(tmp_path_factory.mktemp("own") / "my photos")
    whole = encode(photo(90, 60, 7))
    (photos / "a broken one.jpg").write_bytes(whole[: len(whole) // 2])  # the first by its name
    results = []
    for where, name in ((BuildProgress, "on_commit"), (RunLog, "write"), (None, "")):
        with pytest.MonkeyPatch.context() as patch:
            if where is not None:
                stop_after(patch, where, name)
            results.append(teachercache("distill", photos, "--random-weights", *SMALL))
        if where is BuildProgress:
            shards = int(FeatureCache.open(f"{photos}.teachercache").committed("tiny").sum())
        forget_accelerate()
    return Runs(photos, shards, *results)


def stop_after(patch: pytest.MonkeyPatch, where: type, name: str) -> None:
    """SIGTERM as soon as `where.name` was called."""
    called = getattr(where, name)

    def call(*arguments: Any) -> None:
        called(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(where, name, call)


def test_a_stopped_build_says_that_the_same_command_goes_on(runs: Runs) -> None:
    assert "run the same command again" in str(runs.building.exception)
    assert 0 < runs.shards < IMAGES


def test_a_stopped_training_ends_as_its_launcher_expects(runs: Runs) -> None:
    assert runs.training.exit_code == 128 + signal.SIGTERM
    assert "Five lines" not in runs.training.output


def test_the_same_command_goes_on_to_the_end(runs: Runs) -> None:
    assert runs.finished.exit_code == 0, (runs.finished.output, runs.finished.exception)
    assert len(logged(f"{runs.photos}.student")) == 24
    cache = FeatureCache.open(f"{runs.photos}.teachercache")
    assert (cache.valid_samples().size, cache.num_views) == (IMAGES, 2)
    cache.require_complete()
    assert "1 images cannot be decoded and are left out" in runs.finished.output
    assert "Random weights: tiny." in runs.finished.output


def test_the_five_lines_that_it_prints_use_the_student(runs: Runs) -> None:
    text = runs.finished.output.partition("Five lines of Python use it:")[2].strip()
    lines = text.partition("\n\n")[0].splitlines()
    assert len(lines) == 5
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    assert [map_BChw.shape[-2:] for map_BChw in names["maps"]["tiny"]] == [(2, 2)] * 4


def test_its_recipes_are_complete_and_are_what_is_printed(runs: Runs) -> None:
    files = [Path(f"{runs.photos}.student", f"{name}.yaml") for name in ("photos_cache", "photos_student")]
    printed = teachercache("distill", runs.photos, "--random-weights", *SMALL, "--print-recipes").output
    assert printed == "---\n".join(file.read_text() for file in files)
    assert find_recipe(BuildRecipe, files[0]).teachers["tiny"].pretrained is False
    assert find_recipe(TrainRecipe, files[1]).global_batch_size == IMAGES
    assert find_recipe(BuildRecipe, files[0]).runner.compile is False  # a compiler takes minutes
    assert find_recipe(TrainRecipe, files[1]).student.compile is False
    built = teachercache("build", files[0])
    assert (built.exit_code, "Nothing to do" in built.output) == (0, True), built.exception


def test_a_begun_run_is_not_begun_otherwise(runs: Runs) -> None:
    """Neither by a key nor by another image: before the cache grows and the recipe is replaced."""
    stated = Path(f"{runs.photos}.student", "photos_student.yaml")
    before = stated.read_bytes()
    words = ["distill", runs.photos, "--random-weights", *SMALL]
    refused = teachercache(*words, "--train", "schedule.max_steps=26")
    assert isinstance(refused.exception, RecipeError)
    assert re.search(
        r"got: +schedule.max_steps=26\n.*schedule.max_steps=24\n.*--output", str(refused.exception)
    )
    another = runs.photos / "another.png"
    another.write_bytes(encode(photo(30, 40, 99), format="PNG"))
    refused = teachercache(*words)
    another.unlink()
    assert re.search(rf"images={IMAGES + 1}\n.*images={IMAGES}\n", str(refused.exception))
    assert FeatureCache.open(f"{runs.photos}.teachercache").num_samples == IMAGES + 1
    assert stated.read_bytes() == before
    assert teachercache(*words).exit_code == 0


def test_what_was_chosen_stays_when_the_disk_fills(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalStorage, "free_bytes", lambda _: 1)
    assert choose_recipes(runs.photos, None, None, False, BUILD, TRAIN)[0].views.num_views == 2
    build, _ = choose_recipes(runs.photos, f"{runs.photos}.other", None, False, BUILD[1:], TRAIN)
    assert {teacher.codec for teacher in build.teachers.values()} == {"int4-hadamard"}
    assert build.views.num_views == 1


def test_pretrained_weights_are_not_taken_for_the_random_ones_of_before(runs: Runs) -> None:
    with pytest.raises(
        CacheMismatchError, match=r"pretrained: the cache has False, the recipe asks for True"
    ):
        distill(runs.photos, build=BUILD, train=TRAIN)


def test_what_is_said_of_a_teachers_weights_holds(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    said = {False: "checkpoint: /weights", True: "pretrained: false"}
    for flag, of_weights in said.items():
        build = [*BUILD, f"teachers={{tiny: {{model: test_vit, {of_weights}}}}}"]
        recipe, student = choose_recipes(photos, None, None, flag, build, TRAIN)
        teacher = recipe.teachers["tiny"]
        assert (teacher.checkpoint, teacher.pretrained) == (("/weights", None) if not flag else (None, False))
        assert student.student.pretrained is flag
    two = [*BUILD, "teachers.untiny={model: test_vit}", "teachers.untiny.pretrained=true"]
    recipe, _ = choose_recipes(photos, None, None, False, two, TRAIN)
    assert {name: teacher.pretrained for name, teacher in recipe.teachers.items()} == {
        "tiny": False,
        "untiny": True,
    }


def test_three_images_are_too_few(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", 3)
    with pytest.raises(EmptySourceError, match=r"got: +3 in (.|\n)*do: +add images"):
        distill(photos, pretrained=False, build=BUILD, train=TRAIN)
    assert list(tmp_path.iterdir()) == [photos]


def test_weights_that_cannot_be_had_are_one_error_and_nothing_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    photos = write_photos(tmp_path / "photos")
    with pytest.raises(WeightsNotFoundError, match=r"nothing was begun(.|\n)*--random-weights"):
        distill(photos, build=BUILD, train=TRAIN)
    assert list(tmp_path.iterdir()) == [photos]


@pytest.mark.parametrize(
    ("option", "place"),
    [("cache", "file/photos.cache"), ("output", "file/photos.student"), ("output", "s3://bucket/student")],
)
def test_a_place_that_cannot_be_written_to_names_the_option(tmp_path: Path, option: str, place: str) -> None:
    photos = write_photos(tmp_path / "photos")
    (tmp_path / "file").write_text("")
    where: Any = {option: place if "://" in place else tmp_path / place}
    with pytest.raises(RecipeError, match=rf"Nothing can be written there(.|\n)*do: .*--{option} /"):
        distill(photos, pretrained=False, build=BUILD, train=TRAIN, **where)
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "file"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_folder_beside_which_nothing_can_be_written_asks_for_a_place(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "locked/photos")
    photos.parent.chmod(0o555)
    with pytest.raises(RecipeError, match="--cache"):
        distill(photos, pretrained=False, build=BUILD, train=TRAIN)
    photos.parent.chmod(0o755)


def test_batches_follow_from_the_memory_of_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of one that says it has so many bytes left."""
    photos = write_photos(tmp_path / "photos")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def chosen(nbytes: int) -> tuple[int, int | None, int]:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (nbytes, 80 * 10**9))
        build, train = choose_recipes(photos, None, None, False, BUILD, TRAIN)
        return build.runner.batch_size, train.global_batch_size, train.batch_size_per_process

    assert chosen(10**9) == (16, IMAGES, IMAGES)
    for nbytes, what in ((10**6, "teachers do"), (6 * 10**6, "student does")):
        message = rf"{what} not fit(.|\n)*got: +{nbytes // 10**6} MB of the GPU"
        with pytest.raises(RecipeError, match=message) as error:
            chosen(nbytes)
    needed = float(str(error.value).partition("about ")[2].partition(" MB, for one image")[0])
    views, whole, crops = chosen(int(1.04e6 * needed))
    assert (views, whole, crops < 3) == (16, IMAGES, True)
    assert list(tmp_path.iterdir()) == [photos]
