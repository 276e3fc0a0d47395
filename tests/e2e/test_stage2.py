"""Stage 2 from a cache of scenes: train, resume, compare with online teachers, evaluate."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from teachercache import build, load_student
from teachercache.jobs.cli import app
from teachercache.jobs.train_dry_run import plan_training
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import CacheMismatchError, CheckpointError, RecipeError
from teachercache.pipeline.loading.sampler import random_samples
from teachercache.pipeline.records.view_policy import ViewPolicy
from teachercache.pipeline.views import View, draw_view
from teachercache.student.datasets import open_dataset
from teachercache.student.datasets.labels import render_labels
from teachercache.student.datasets.scenes import write_scenes
from teachercache.student.measuring.evaluate import evaluate
from teachercache.student.metrics import MeanIoU
from teachercache.student.training.train import train
from teachercache.student.training.view_labels import ViewLabels
from tests.make_cache import build_recipe
from tests.train_recipes import CONTENT, logged, train_recipe

SIZE = (32, 48)
STEPS = 6


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, train=6, val=5, size=(40, 56))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    """Three augmented views of each scene, with real features of two small teachers."""
    folder = tmp_path_factory.mktemp("cache") / "cache"
    teachers = {
        "tiny": {"model": "vit_tiny_patch16_224", "pretrained": False, "codec": "f32"},
        "test": {"model": "test_vit", "pretrained": False, "codec": "f32"},
    }
    views = {"policy": "multitask_train", "num_views": 3, "size": list(SIZE)}
    recipe = build_recipe(folder, scenes / "images/train", teachers=teachers, views=views)
    build(recipe, Console(quiet=True))
    return folder


def stage_2(scenes: Path, **changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = {
        "multitask": {"dataset": {"kind": "scenes", "root": str(scenes)}},
        "schedule": {"kind": "poly", "max_steps": STEPS, "final_lr": 0.0},
        "clip_norm": 10.0,
    }
    return content | changes


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path, scenes: Path) -> Path:
    output = tmp_path_factory.mktemp("run")
    assert train(train_recipe(cache, output, **stage_2(scenes))).steps == STEPS
    AcceleratorState._reset_state(reset_partial_state=True)
    return output


def test_the_loss_is_the_sum_of_distillation_and_tasks(finished: Path, scenes: Path) -> None:
    weights = {"semseg": 1, "parts": 2, "saliency": 5, "normals": 10, "depth": 1, "boundary": 50}
    total = sum(
        weight * np.array(logged(finished, f"loss/{task}")) for task, weight in weights.items()
    ) + sum(
        np.array(logged(finished, f"loss/{teacher}/level{level}"))
        for teacher in ("tiny", "test")
        for level in range(4)
    )
    assert logged(finished) == pytest.approx(total, rel=1e-5)
    rates = [(1 - step / STEPS) ** 0.9 * 1e-3 for step in range(STEPS)]
    assert logged(finished, "lr") == pytest.approx(rates)
    gates = [logged(finished, f"gate/semseg/level0/{expert}") for expert in ("stem", "tiny", "test")]
    assert np.sum(gates, axis=0) == pytest.approx(1, abs=1e-5)


def test_a_resumed_run_is_the_same_run(finished: Path, cache: Path, scenes: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "checkpoints/step_00000003", tmp_path / "checkpoints/step_00000003")
    shutil.copy(finished / "metrics.jsonl", tmp_path)
    train(train_recipe(cache, tmp_path, **stage_2(scenes)))
    assert logged(tmp_path) == logged(finished)
    weights, expected = (load_file(run / "student/model.safetensors") for run in (tmp_path, finished))
    assert all(weights[name].equal(tensor) for name, tensor in expected.items())


def test_online_teachers_give_the_losses_of_the_cache(cache: Path, scenes: Path, tmp_path: Path) -> None:
    losses = []
    for features in ("cached", "online"):
        schedule = {"kind": "poly", "max_steps": 20, "final_lr": 0.0}
        changes = {"features": features, "schedule": schedule, "optimizer": {"lr": 2e-5}}  # the paper's
        train(train_recipe(cache, tmp_path / features, **stage_2(scenes, **changes)))
        losses.append(logged(tmp_path / features))
    assert len(losses[0]) == 20
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_labels_of_other_images_are_refused(cache: Path, tmp_path: Path) -> None:
    """Scenes of another seed have the same keys and sizes."""
    write_scenes(tmp_path / "others", train=6, val=5, size=(40, 56), seed=7)
    others = stage_2(tmp_path / "others")
    with pytest.raises(CacheMismatchError, match="are not of the image that was cached"):
        train(train_recipe(cache, tmp_path / "run", **others))
    others["multitask"]["dataset"]["reencoded"] = True  # whoever says so is believed, where the sizes agree
    assert train(train_recipe(cache, tmp_path / "again", **others)).steps == STEPS


def test_labels_alone_leave_the_features_unread(cache: Path, scenes: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(cache, tmp_path / "cache")
    for shard in (copy / "teachers").rglob("c/*"):
        shutil.rmtree(shard)
    student = CONTENT["student"] | {"fusion": "sum"}
    recipe = train_recipe(copy, tmp_path / "run", **stage_2(scenes, teachers=[], student=student))
    result = train(recipe)
    assert result.student is not None
    assert load_student(result.student).teachers == []
    with pytest.raises(KeyError):
        logged(tmp_path / "run", "loss/tiny/level0")


@pytest.mark.parametrize(
    ("student", "trained"),
    [
        ({"freeze": ["stem", "paths"]}, ("decoder.",)),
        ({"freeze": ["stem"]}, ("decoder.", "paths.")),
        ({"lora_rank": 2}, ("decoder.", "paths.", "stem.")),
    ],
)
def test_only_what_should_learn_does(
    cache: Path, scenes: Path, tmp_path: Path, student: dict[str, Any], trained: tuple[str, ...]
) -> None:
    first = train(train_recipe(cache, tmp_path / "stage1", schedule={"max_steps": 2}))
    assert first.student is not None
    student = CONTENT["student"] | {"init_from": str(first.student)} | student
    schedule = {"kind": "poly", "max_steps": 3}
    distillation = {"weight": 0.0 if "paths" in student.get("freeze", ()) else 1.0}
    AcceleratorState._reset_state(reset_partial_state=True)
    changes = stage_2(scenes, student=student, schedule=schedule, distillation=distillation)
    second = train(train_recipe(cache, tmp_path / "stage2", **changes))
    assert second.student is not None
    before, after = (load_file(path / "model.safetensors") for path in (first.student, second.student))
    changed = {name for name, tensor in after.items() if not torch.equal(before.get(name, tensor), tensor)}
    assert all(name.startswith(trained) for name in changed)
    for part in {"paths.", "stem."} & set(trained):
        assert any(name.startswith(part) for name in changed)
    if "lora_rank" in student:
        assert "stem.vit.patch_embed.proj.weight" not in changed


def test_a_new_teacher_grows_a_student(cache: Path, tmp_path: Path) -> None:
    first = train(train_recipe(cache, tmp_path / "one", teachers=["tiny"], schedule={"max_steps": 2}))
    student = CONTENT["student"] | {"init_from": str(first.student)}
    AcceleratorState._reset_state(reset_partial_state=True)
    changes = {"teachers": ["test"], "student": student, "schedule": {"max_steps": 2}}
    second = train(train_recipe(cache, tmp_path / "two", **changes))
    assert first.student is not None
    assert second.student is not None
    before, after = (load_file(path / "model.safetensors") for path in (first.student, second.student))
    assert all(after[name].equal(tensor) for name, tensor in before.items())
    assert any(name.startswith("paths.test.") for name in after)


@pytest.mark.parametrize(("stem", "fusion"), [("test_vit", "mor"), (None, "concat")])
def test_tasks_are_learnt_on_the_teachers_features_alone(
    cache: Path, scenes: Path, tmp_path: Path, stem: str | None, fusion: str
) -> None:
    """SAK, Table 19: what the encoders of the teachers give is read, and never computed."""
    student = {"kind": "amalgam", "stem": stem, "fusion": fusion, "pretrained": False}
    changes = stage_2(scenes, student=student, distillation={"weight": 0})
    result = train(train_recipe(cache, tmp_path / "run", **changes))
    assert result.student is not None
    loaded = load_student(result.student)
    assert loaded.experts == [*(["stem"] if stem else []), "tiny", "test"]
    assert sum(loaded.parameters_by_part().values()) == sum(p.numel() for p in loaded.parameters())
    assert logged(tmp_path / "run")[-1] < logged(tmp_path / "run")[0]

    dataset = open_dataset("scenes", scenes, "val")
    with pytest.raises(RecipeError, match="no cache"):
        evaluate(loaded, dataset)
    teachers = {
        "tiny": {"model": "vit_tiny_patch16_224", "pretrained": False, "codec": "f32"},
        "test": {"model": "test_vit", "pretrained": False, "codec": "f32"},
    }
    views = {"policy": "multitask_eval", "size": list(SIZE)}
    recipe = build_recipe(tmp_path / "val", scenes / "images/val", teachers=teachers, views=views)
    build(recipe, Console(quiet=True))
    found = evaluate(loaded, dataset, cache=FeatureCache.open(tmp_path / "val"), batch_size=2)
    assert found.num_images == 5
    assert all(np.isfinite(score) for score in found.scores.values())


def test_a_fraction_of_the_data_is_an_override(
    cache: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SAK, Table 18. Half of six images in steps of one: three steps an epoch, in training and in a plan."""
    dataset = {"kind": "scenes", "root": str(scenes), "fraction": 0.5}
    content = stage_2(scenes, multitask={"dataset": dataset}, schedule={"epochs": 2})
    recipe = train_recipe(cache, tmp_path, batch_size_per_process=1, **content)
    assert plan_training(recipe, processes=1, tflops_per_gpu=1).steps == 6
    seen: set[str] = set()
    read = ViewLabels.read

    def noted(labels: ViewLabels, key: str, view: View) -> Mapping[str, Tensor]:
        seen.add(key)
        return read(labels, key, view)

    monkeypatch.setattr(ViewLabels, "read", noted)
    assert train(recipe).steps == 6
    opened = FeatureCache.open(cache)
    assert seen == {opened.key(sample) for sample in random_samples(6, 0.5).tolist()}
    AcceleratorState._reset_state(reset_partial_state=True)
    whole = recipe.model_copy(
        update={
            "multitask": recipe.multitask
            and recipe.multitask.model_copy(
                update={"dataset": recipe.multitask.dataset.model_copy(update={"fraction": 1.0})}
            )
        }
    )
    with pytest.raises(CheckpointError, match=r"multitask.dataset.fraction: 1.0"):
        train(whole)


def test_images_without_labels_are_refused(cache: Path, scenes: Path, tmp_path: Path) -> None:
    dataset = {"kind": "scenes", "root": str(scenes), "split": "val"}
    with pytest.raises(RecipeError, match="6 of 6"):
        train(train_recipe(cache, tmp_path, multitask={"dataset": dataset}))
    changes = stage_2(scenes)
    changes["multitask"]["tasks"] = ["semseg", "normal"]
    with pytest.raises(RecipeError, match="did you mean normals"):
        train(train_recipe(cache, tmp_path, **changes))


def test_evaluation_measures_what_it_writes(finished: Path, scenes: Path, tmp_path: Path) -> None:
    found = CliRunner().invoke(
        app, ["evaluate", str(finished / "student"), "scenes", str(scenes), "-o", str(tmp_path)]
    )
    assert found.exit_code == 0, found.output
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["num_images"] == 5
    assert scores["scores"].keys() == {"semseg", "parts", "saliency", "normals", "depth", "boundary"}
    assert {task: set(others) for task, others in scores["further"].items()} == {
        "saliency": {"maxF per image"},
        "boundary": {"oisF", "AP"},
    }
    assert scores["further"]["boundary"]["oisF"] >= scores["scores"]["boundary"]
    assert "Segmentation mIoU" in (tmp_path / "scores.md").read_text()
    dataset = open_dataset("scenes", scenes, "val")
    policy = ViewPolicy(policy="multitask_eval", size=SIZE)
    again = MeanIoU(dataset.tasks["semseg"])
    for index, key in enumerate(dataset.keys):
        with Image.open(tmp_path / f"predictions/semseg/{key}.png") as image:
            predicted_HW = torch.from_numpy(np.array(image))
        source = dataset.image(index)
        view = draw_view(policy, key, source.width, source.height, 0)
        again.update(predicted_HW, render_labels(dataset.labels(index, ["semseg"]), view)["semseg"])
    assert 100 * again.compute() == pytest.approx(scores["scores"]["semseg"])
    for name in ("predictions.png", "gates.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 100


def test_batches_do_not_change_a_score(finished: Path, scenes: Path) -> None:
    student, dataset = load_student(finished / "student"), open_dataset("scenes", scenes, "val")
    one, three = (evaluate(student, dataset, batch_size=size) for size in (1, 3))
    assert one.scores == pytest.approx(three.scores, rel=1e-5)
    assert one.scores["normals"] > 0


def test_a_student_without_tasks_cannot_be_evaluated(cache: Path, scenes: Path, tmp_path: Path) -> None:
    result = train(train_recipe(cache, tmp_path, schedule={"max_steps": 1}))
    assert result.student is not None
    with pytest.raises(RecipeError, match="no task in common"):
        evaluate(load_student(result.student), open_dataset("scenes", scenes, "val"))
