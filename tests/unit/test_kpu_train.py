"""A KPU through the trainer: exact resume, live teachers, what it reads of a cache, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from teachercache import build
from teachercache.jobs.cli import app
from teachercache.jobs.inspection.explorer import Comparisons
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import CacheError, RecipeError
from teachercache.pipeline.loading.loader import FeatureLoader
from teachercache.pipeline.loading.sampler import ShardShuffleSampler
from teachercache.pipeline.records.spec import GridSpec
from teachercache.pipeline.sources import open_source
from teachercache.student.build import load_student
from teachercache.student.kpu.latent_space import Features
from teachercache.student.kpu.model import KPU
from teachercache.student.measuring.evaluate import evaluate
from teachercache.student.measuring.gap import teacher_gap
from teachercache.student.measuring.image_features import StudentFeatures
from teachercache.student.similarity import representation_similarity
from teachercache.student.training.objectives import last_level
from teachercache.student.training.preflight import notices
from teachercache.student.training.targets import CachedTargets
from teachercache.student.training.train import train
from tests.make_cache import build_recipe, make_cache, make_images, teacher_spec
from tests.train_recipes import CONTENT, logged, train_recipe
from tests.unit.test_kpu import BASE_A, BASE_B, BASE_C

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
STUDENT = {"kind": "kpu", "stem": "test_vit", "pretrained": False}


def kpu_recipe(cache: Path, output: Path, student: dict[str, Any] | None = None, **changes: Any) -> Any:
    return train_recipe(cache, output, student=STUDENT | (student or {}), **changes)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 10)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """One teacher with a class token and four levels, one without and with one level."""
    path = tmp_path_factory.mktemp("cache")
    plain = teacher_spec(width=4, grid=9, codec="f16").model_copy(update={"block_indices": (3,)})
    teachers = {"clip": teacher_spec(cls_token=True), "sam": plain}
    make_cache(path, images, teachers=teachers, invalid_samples=[4], view_size=(64, 64))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    output = tmp_path_factory.mktemp("run")
    assert train(kpu_recipe(cache, output, picture_every_steps=4)).steps == 8
    return output


def test_a_resumed_run_is_the_same_run(cache: Path, finished: Path, tmp_path: Path) -> None:
    name = "step_00000003"
    shutil.copytree(finished / "checkpoints" / name, tmp_path / "checkpoints" / name)
    shutil.copy(finished / "metrics.jsonl", tmp_path)
    train(kpu_recipe(cache, tmp_path))
    assert logged(tmp_path) == logged(finished)
    weights, expected = (load_file(run / "student/model.safetensors") for run in (tmp_path, finished))
    assert all(weights[name].equal(tensor) for name, tensor in expected.items())


def test_the_sentinel_of_a_finished_run_is_what_it_was(finished: Path) -> None:
    first, last = (
        load_file(finished / "checkpoints" / name / "model.safetensors")
        for name in ("step_00000003", "step_00000008")
    )
    same = {name for name, tensor in first.items() if tensor.equal(last[name])}
    assert {name for name in first if name.startswith("stem.")} <= same
    assert "vit_adapter.injectors.0.gamma" not in same


def test_accumulation_is_one_large_batch(cache: Path, tmp_path: Path) -> None:
    losses = []
    for size, count in ((4, 1), (2, 2)):
        sizes: dict[str, Any] = {"batch_size_per_process": size, "gradient_accumulation_steps": count}
        train(kpu_recipe(cache, tmp_path / str(count), schedule={"max_steps": 5}, **sizes))
        losses.append(logged(tmp_path / str(count)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_the_student_learns(cache: Path, tmp_path: Path) -> None:
    batches: dict[str, Any] = {"schedule": {"epochs": 10}, "batch_size_per_process": 3}
    train(kpu_recipe(cache, tmp_path, optimizer={"lr": 1e-3}, **batches))
    for key in ("loss", "loss/clip/s2t", "loss/clip/t2s", "loss/clip/rec"):
        losses = logged(tmp_path, key)
        assert sum(losses[-3:]) < 0.9 * sum(losses[:3]), key


@pytest.mark.parametrize(
    ("switches", "spaces"), [(BASE_A, "s2t"), (BASE_B, "s2t"), (BASE_C, "s2t t2s"), ({}, "s2t t2s rec")]
)
def test_the_rows_of_table_2(cache: Path, tmp_path: Path, switches: dict[str, bool], spaces: str) -> None:
    result = train(kpu_recipe(cache, tmp_path, switches, schedule={"max_steps": 2}, mixed_precision="bf16"))
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert {key.split("/")[2] for key in line if key.startswith("loss/")} == set(spaces.split())
    total = sum(value for key, value in line.items() if key.startswith("loss/")) / 2
    assert line["loss"] == pytest.approx(total, rel=1e-5)
    assert result.student is not None
    assert load_student(result.student).config | switches == load_student(result.student).config


def test_targets_are_the_last_level_and_its_class_token(cache: Path) -> None:
    opened = FeatureCache.open(cache)
    sampler = ShardShuffleSampler(opened, ["clip", "sam"], batch_size_per_process=3)
    with FeatureLoader(opened, sampler, ["clip", "sam"], images=False) as loader:
        batch = next(iter(loader))
        targets = CachedTargets(opened, ["clip", "sam"], torch.device("cpu"))(batch)
    clip, sam = targets["clip"], targets["sam"]
    image, maps = last_level(clip)
    stored = opened.read(batch.rows, ["clip"])["clip"].decode()
    assert maps.permute(0, 2, 3, 1).equal(stored[:, -1])
    assert image is not None
    assert image.equal(opened.read_tokens(batch.rows, "clip", "cls")[:, -1])
    assert last_level(sam).image is None


def test_live_teachers_give_the_losses_of_the_cache(images: Path, tmp_path: Path) -> None:
    """Of class tokens too, in float32 on the teachers' own grids."""
    tiny = {"model": "vit_tiny_patch16_224", "pretrained": False, "image_size": 64, "codec": "f32"}
    teachers = {"with": tiny | {"cls_token": True}, "without": tiny | {"random_seed": 1}}
    views = {"num_views": 2, "size": [64, 64]}
    build(build_recipe(tmp_path / "cache", images, teachers=teachers, views=views), Console(quiet=True))
    losses = {}
    for features in ("cached", "online"):
        recipe = kpu_recipe(
            tmp_path / "cache", tmp_path / features, schedule={"max_steps": 20}, features=features
        )
        train(recipe)
        losses[features] = logged(tmp_path / features)
        assert min(logged(tmp_path / features, "image_cosine/with/s2t")) > 0
    assert len(losses["cached"]) == 20
    assert losses["online"] == pytest.approx(losses["cached"], rel=1e-5)


def test_half_precision_teachers_can_be_live(images: Path, tmp_path: Path) -> None:
    """The shipped recipe's teachers run in bfloat16; the projections are float32 without autocast."""
    tiny = {"model": "vit_tiny_patch16_224", "pretrained": False, "image_size": 64, "codec": "f32"}
    teachers = {"sixteen": tiny | {"cls_token": True, "precision": "bfloat16"}}
    views = {"num_views": 1, "size": [64, 64]}
    build(build_recipe(tmp_path / "cache", images, teachers=teachers, views=views), Console(quiet=True))
    train(kpu_recipe(tmp_path / "cache", tmp_path / "run", schedule={"max_steps": 2}, features="online"))
    assert len(logged(tmp_path / "run")) == 2


def test_tokens_are_compared_one_by_one_unless_the_recipe_says_otherwise(cache: Path, tmp_path: Path) -> None:
    by_default, explicit = (
        kpu_recipe(cache, tmp_path / str(i), schedule={"max_steps": 1}, distillation=distillation)
        for i, distillation in enumerate(({}, {"cosine": "token"}))
    )
    assert by_default.distillation.cosine is None
    for recipe in (by_default, explicit):
        train(recipe)
    assert logged(tmp_path / "0") == logged(tmp_path / "1")


def test_without_any_class_token_a_run_says_that_x_learns_nothing(cache: Path) -> None:
    recipe, spec = kpu_recipe(cache, cache / "run"), FeatureCache.open(cache).spec
    assert notices(recipe, spec, ["clip", "sam"]) == []
    assert "No class token of sam is cached" in notices(recipe, spec, ["sam"])[0]


def test_what_a_run_leaves(cache: Path, finished: Path) -> None:
    student = load_student(finished / "student")
    assert isinstance(student, KPU)
    assert student.teachers == ["clip", "sam"]
    assert student.config["class_tokens"] == ["clip"]
    card = (finished / "student/README.md").read_text()
    assert "# KPU, test_vit" in card
    assert "{teacher: 1 × (B, C, h, w)} for clip, sam" in card
    assert "| extractors |" in card
    similar = representation_similarity(student, FeatureCache.open(cache))
    assert [len(similarity.levels) for similarity in similar.values()] == [1, 1]
    told = CliRunner().invoke(app, ["repsim", str(finished / "student"), str(cache)])
    assert told.exit_code == 0, told.output
    planned = CliRunner().invoke(app, ["train", str(write_recipe(cache, finished)), "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert "at least" in planned.output


def write_recipe(cache: Path, folder: Path) -> Path:
    recipe = kpu_recipe(cache, folder / "planned")
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe.model_dump(mode="json")))
    return file


def test_features_to_probe_are_x_and_the_means_of_the_maps_that_are_compared(
    images: Path, finished: Path
) -> None:
    student = load_student(finished / "student")
    assert isinstance(student, KPU)
    features = StudentFeatures(student, open_source(images), batch_size=4)
    found_NF = features.read(range(5))
    assert found_NF.shape == (5, features.width) == (5, (1 + len(student.scales)) * 64)
    with torch.no_grad():
        pixels = student.normalize(torch.stack([features._image(number) for number in range(5)]))
        image_BD, maps_BDhw = student.features(pixels)
    expected = torch.cat([image_BD, *(maps_BDhw[level].mean((2, 3)) for level in student.scales)], dim=1)
    np.testing.assert_allclose(found_NF, expected, atol=1e-5)


def test_the_gap_between_teachers_is_that_of_their_last_levels_and_of_what_h_t2s_makes_of_them(
    cache: Path, finished: Path
) -> None:
    told = CliRunner().invoke(app, ["gap", str(finished / "student"), str(cache), "--json"])
    assert told.exit_code == 0, told.output
    found = json.loads(told.output)
    student, opened = load_student(finished / "student"), FeatureCache.open(cache)
    assert isinstance(student, KPU)
    sampler = ShardShuffleSampler(opened, ["clip", "sam"], batch_size_per_process=opened.num_samples - 1)
    rows = sampler.batch(0)
    grids = {"clip": (2, 2), "sam": (8, 8)}
    for name in ("clip", "sam"):
        own = opened.feature_maps(name, rows)[:, -1].permute(0, 3, 1, 2)
        image = opened.read_tokens(rows, "clip", "cls")[:, -1] if name == "clip" else None
        with torch.no_grad():
            shared = student.latent_space["t2s"][name](Features(image, own), grids[name]).map
        for space, map_BCHW in (("own", own), ("shared", shared)):
            spread = map_BCHW.double().var((0, 2, 3), correction=0).mean().sqrt().item()
            assert found[name][space] == pytest.approx(spread, rel=1e-5)
    ratio = found["largest / smallest"]["own"]
    assert ratio == pytest.approx(max(found[n]["own"] for n in grids) / min(found[n]["own"] for n in grids))
    half = CliRunner().invoke(app, ["gap", str(finished / "student"), str(cache), "--max-samples", "4"])
    assert "largest / smallest" in half.output


def test_a_student_without_a_shared_space_has_no_gap_to_measure(cache: Path) -> None:
    student = KPU(
        "test_vit", {"clip": 8}, (64, 64), {"clip": (8, 8)}, unification=False, reconstruction=False
    )
    with pytest.raises(RecipeError, match=r"no space(.|\n)*unification=true"):
        teacher_gap(student, FeatureCache.open(cache))


def test_an_adjoint_is_refused(images: Path, tmp_path: Path) -> None:
    adjoint = GridSpec(kind="adjoint", size=(2, 2))
    spec = teacher_spec(grid=5).model_copy(update={"grid": adjoint})
    make_cache(tmp_path / "cache", images, teachers={"a": spec})
    with pytest.raises(RecipeError, match=r"grid: adjoint(.|\n)*grid: native or bilinear"):
        train(kpu_recipe(tmp_path / "cache", tmp_path / "run"))


def test_it_is_viewed_beside_the_last_level(cache: Path, finished: Path) -> None:
    shown = Comparisons(FeatureCache.open(cache), load_student(finished / "student"))
    assert shown.student_error("clip", 0, 3).note
    assert shown.student_error("sam", 0, 0).note
    with pytest.raises(CacheError, match="the last 1 of this teacher's levels"):
        shown.student_error("clip", 0, 2)


def test_it_has_no_tasks_to_measure(finished: Path) -> None:
    dataset: Any = SimpleNamespace(tasks={"semseg": 40})
    with pytest.raises(RecipeError, match=r"no task in common(.|\n)*no task"):
        evaluate(load_student(finished / "student"), dataset)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"unification": False}}, "reconstruction=false too"),
        ({"student": {"lora_rank": 2}}, "keeps its sentinel"),
        ({"student": {"init_from": "x"}}, "own weights"),
        ({"student": {"stem": None}}, "only an amalgam"),
        ({"multitask": {"dataset": {"kind": "nyud", "root": "x"}}}, "learns no tasks"),
        ({"distillation": {"weight": 0}}, "at least one teacher"),
    ],
)
def test_recipes_that_contradict_themselves(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kpu_recipe(Path("cache"), Path("run"), **changes)
    assert CONTENT["student"]["stem"] == STUDENT["stem"]
