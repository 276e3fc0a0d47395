"""Teachers with images of their own: a step takes a batch of each input, and is one step (KPU)."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from teachercache import build
from teachercache.cache_builder.plan import pixel_bytes
from teachercache.jobs.cli import app
from teachercache.jobs.train_dry_run import plan_training
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import CheckpointError, RecipeError
from teachercache.pipeline.loading.loader import FeatureLoader
from teachercache.pipeline.loading.sampler import ShardShuffleSampler, held_out_samples
from teachercache.pipeline.rearranging.convert import convert
from teachercache.pipeline.recipe_files import load_recipe
from teachercache.pipeline.units import human_bytes
from teachercache.student.build import load_student
from teachercache.student.kpu.model import KPU
from teachercache.student.losses.alignment import AlignmentLoss
from teachercache.student.timing import StageTimer
from teachercache.student.training.objectives import KPUObjective, last_level
from teachercache.student.training.targets import CachedTargets
from teachercache.student.training.train import train
from teachercache.student.training.train_recipe import TrainRecipe
from tests.make_cache import build_recipe, make_images
from tests.train_recipes import CONTENT, logged

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
TINY = {"model": "test_vit", "pretrained": False, "codec": "f32"}
STUDENT = {"kind": "kpu", "stem": "test_vit", "pretrained": False}


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One of squares for two teachers, and one of oblongs for a third."""
    root = tmp_path_factory.mktemp("caches")
    images = make_images(root / "images", 9)
    square, oblong = {"image_size": 64}, {"image_size": [96, 64]}
    teachers = {
        "small": {"clip": TINY | square | {"cls_token": True}, "dino": TINY | square | {"random_seed": 1}},
        "large": {"detector": TINY | oblong | {"random_seed": 2}},
    }
    for name, size in (("small", [64, 64]), ("large", [96, 64])):
        views = {"num_views": 1, "size": size}
        build(build_recipe(root / name, images, teachers=teachers[name], views=views), Console(quiet=True))
    return [root / "small", root / "large"]


def recipe(caches: list[Path], output: Path, steps: int = 5, **changes: Any) -> TrainRecipe:
    inputs = [
        {"cache": str(cache), "batch_size_per_process": size}
        for cache, size in zip(caches, (4, 2), strict=True)
    ]
    stated = {"student": STUDENT, "schedule": {"max_steps": steps}, "output": str(output), "inputs": inputs}
    content = {key: value for key, value in CONTENT.items() if key != "batch_size_per_process"}
    return TrainRecipe.model_validate(content | stated | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, caches: list[Path]) -> Path:
    output = tmp_path_factory.mktemp("run")
    train(recipe(caches, output, distillation={"weighting": "famo"}))
    return output


def test_a_resumed_run_of_two_inputs_and_famo_is_the_same_run(
    caches: list[Path], finished: Path, tmp_path: Path
) -> None:
    name = "checkpoints/step_00000003"
    shutil.copytree(finished / name, tmp_path / name)
    shutil.copy(finished / "metrics.jsonl", tmp_path)
    train(recipe(caches, tmp_path, distillation={"weighting": "famo"}))
    assert logged(tmp_path) == logged(finished)
    weights, expected = (load_file(run / "student/model.safetensors") for run in (tmp_path, finished))
    assert all(weights[name].equal(tensor) for name, tensor in expected.items())
    weights_of = [logged(finished, f"weight/{teacher}") for teacher in ("clip", "dino", "detector")]
    assert [sum(of_step) for of_step in zip(*weights_of, strict=True)] == pytest.approx([1.0] * 5)


def test_two_inputs_stream_and_a_resumed_run_is_the_same_run(caches: list[Path], tmp_path: Path) -> None:
    tars = [tmp_path / "tars" / cache.name for cache in caches]
    for cache, place in zip(caches, tars, strict=True):
        convert(str(cache), str(place), "webdataset").run()
    loader = {"kind": "stream", "shuffle_buffer": 4, "threads": 2}
    train(recipe(tars, tmp_path / "run", loader=loader))
    losses = logged(tmp_path / "run")
    assert len(logged(tmp_path / "run", "loss/detector/s2t")) == len(losses) == 5
    for late in ("step_00000005", "step_00000004"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / late, ignore_errors=True)
    train(recipe(tars, tmp_path / "run", loader=loader))
    assert logged(tmp_path / "run") == losses


def test_live_teachers_give_the_losses_of_the_caches(caches: list[Path], tmp_path: Path) -> None:
    for features in ("cached", "online"):
        train(recipe(caches, tmp_path / features, 10, features=features))
    assert logged(tmp_path / "online") == pytest.approx(logged(tmp_path / "cached"), rel=1e-5)


def test_the_loss_of_a_step_is_the_mean_over_the_teachers_of_both_inputs_and_one_gradient(
    caches: list[Path], finished: Path
) -> None:
    student = load_student(finished / "student")
    assert isinstance(student, KPU)
    assert student.config["image_sizes"] == {"detector": [96, 64]}
    opened = [FeatureCache.open(cache) for cache in caches]
    targets = [CachedTargets(one, one.teachers, torch.device("cpu")) for one in opened]
    batches = []
    for one, size in zip(opened, (4, 2), strict=True):
        sampler = ShardShuffleSampler(one, batch_size_per_process=size)
        with FeatureLoader(one, sampler, one.teachers) as loader:
            batches.append(next(iter(loader)))
    total, terms = KPUObjective(student, student, targets, AlignmentLoss())(
        batches, StageTimer(torch.device("cpu"))
    )
    losses = []
    for batch, target in zip(batches, targets, strict=True):
        teachers = {name: last_level(one) for name, one in target(batch).items()}
        found = student(student.normalize(batch.images), teachers=teachers)
        losses += [AlignmentLoss()({name: one})[0] for name, one in found.items()]
    assert total.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert {key.split("/")[1] for key in terms} == {"clip", "dino", "detector"}
    total.backward()
    learning = {name for name, one in student.named_parameters() if one.requires_grad}
    assert {name for name, one in student.named_parameters() if one.grad is not None} == learning


def test_a_sentinel_resamples_its_positions_to_each_size_and_is_what_it_was_at_its_own() -> None:
    arguments: dict[str, Any] = {
        "teacher_dims": {"a": 8, "b": 8},
        "image_size": (64, 64),
        "teacher_grids": {"a": (4, 4), "b": (6, 4)},
    }
    fixed = KPU("test_vit", **arguments).eval()
    taking_turns = KPU("test_vit", **arguments, image_sizes={"b": (96, 64)}).eval()
    taking_turns.load_state_dict(fixed.state_dict())
    small, large = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        expected = fixed.project(small)["a"].map
        assert taking_turns.project(small)["a"].map.equal(expected)
        other = taking_turns.project(large)["b"].map
        assert other.shape == (1, 8, 6, 4)
        assert taking_turns.project(small)["a"].map.equal(expected)
        fixed.stem.resize((96, 64))
        assert other.equal(fixed.project(large)["b"].map), "as positions that were resampled once"


def test_a_stem_that_takes_one_size_alone_is_refused_before_it_has_weights() -> None:
    with torch.device("meta"), pytest.raises(RecipeError, match="beit_base_patch16_224 cannot take images"):
        KPU(
            "beit_base_patch16_224",
            teacher_dims={"a": 8},
            image_size=(64, 64),
            teacher_grids={"a": (4, 4)},
            image_sizes={"b": (96, 64)},
        )


def test_the_plan_counts_the_images_of_all_inputs(caches: list[Path], finished: Path, tmp_path: Path) -> None:
    planned = plan_training(recipe(caches, tmp_path), processes=2, tflops_per_gpu=100)
    alone = [plan_training(one, processes=2, tflops_per_gpu=100) for one in recipe(caches, tmp_path).each]
    assert (planned.steps, planned.images_per_step) == (5, 12)
    assert planned.gpu_hours == pytest.approx(sum(plan.gpu_hours for plan in alone))
    famo = recipe(caches, tmp_path, distillation={"weighting": "famo"})
    twice = plan_training(famo, processes=2, tflops_per_gpu=100).size.train_gmacs
    assert twice == pytest.approx(planned.size.train_gmacs + planned.size.gmacs), "a forward pass more"
    assert planned.size.trained == sum(
        one.numel() for one in load_student(finished / "student").parameters() if one.requires_grad
    )
    rows = [plan.row_bytes * plan.images_per_step for plan in alone]
    assert planned.row_bytes * 12 == pytest.approx(sum(rows), rel=1e-3)
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe(caches, tmp_path).model_dump(mode="json")))
    told = CliRunner().invoke(app, ["train", str(file), "--dry-run", "--costs"])
    assert told.exit_code == 0, told.output
    assert "5 of 6 images" in told.output
    assert "detector" in told.output


def test_epochs_are_of_the_first_input_and_each_holds_out_images_of_its_own(
    caches: list[Path], tmp_path: Path
) -> None:
    schedule = {"epochs": 2, "warmup_epochs": 1}
    run = recipe(caches, tmp_path, schedule=schedule, validation={"fraction": 0.3, "every_steps": 2})
    planned = plan_training(run, processes=1, tflops_per_gpu=100)
    result = train(run)
    keys = FeatureCache.open(caches[0]).samples["key"].to_pylist()
    trained_on = len(keys) - len(held_out_samples(keys, 0.3, run.seed))
    assert 0 < trained_on < len(keys)
    assert result.steps == planned.steps == math.ceil(2 * trained_on / 4)
    assert set(result.similarity) == {"clip", "dino", "detector"}
    assert all(-1 <= one.mean <= 1 for one in result.similarity.values())


def test_the_card_names_the_teachers_of_all_caches(finished: Path) -> None:
    card = (finished / "student/README.md").read_text()
    assert "of an earlier run" not in card
    assert "cache: small" in card
    assert "cache: large" in card


def test_likeness_and_gap_are_measured_at_the_size_of_each_teacher(
    caches: list[Path], finished: Path
) -> None:
    student = str(finished / "student")
    told = CliRunner().invoke(app, ["gap", student, *map(str, caches), "--max-samples", "3", "--json"])
    assert told.exit_code == 0, told.output
    assert list(json.loads(told.output)) == ["clip", "dino", "detector", "largest / smallest"]
    for cache, teachers in zip(caches, (["clip", "dino"], ["detector"]), strict=True):
        told = CliRunner().invoke(app, ["repsim", student, str(cache), "--max-samples", "3", "--json"])
        assert told.exit_code == 0, told.output
        assert list(json.loads(told.output)) == teachers


def test_a_run_goes_on_with_the_same_inputs_alone(caches: list[Path], finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    changed = recipe(caches, tmp_path, distillation={"weighting": "famo"})
    inputs = tuple(one.model_copy(update={"batch_size_per_process": 3}) for one in changed.inputs)
    with pytest.raises(CheckpointError, match="inputs"):
        train(changed.model_copy(update={"inputs": inputs}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"stem": "test_vit"}}, "only a kpu sees images of several sizes"),
        ({"validation": {"cache": "another"}}, r"give validation\.fraction"),
        ({"inputs": [1, 2]}, "InputRecipe"),
        ({"teachers": ["clip"]}, "leave them out beside inputs"),
        ({"cache": "another"}, "leave them out beside inputs"),
        ({"batch_size_per_process": 8}, "leave them out beside inputs"),
    ],
)
def test_recipes_of_inputs_that_contradict_themselves(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe([Path("a"), Path("b")], Path("run"), **changes)


def test_what_contradicts_itself_is_not_printed_whole(tmp_path: Path) -> None:
    kinds = {"student": {"kind": "kpu"}, "schedule": {"epochs": 1}}
    stated = {"cache": "c", "output": "o", "cutmix": True, **kinds}
    (tmp_path / "recipe.yaml").write_text(json.dumps(stated))
    with pytest.raises(RecipeError, match="cutmix") as raised:
        load_recipe(TrainRecipe, tmp_path / "recipe.yaml", [])
    assert "got" not in str(raised.value)


def test_a_weight_of_no_teacher_is_refused_for_one_input_too(caches: list[Path], tmp_path: Path) -> None:
    inputs = [{"cache": str(caches[0]), "batch_size_per_process": 4}]
    with pytest.raises(RecipeError, match=r"did you mean clip\?"):
        train(recipe(caches, tmp_path, inputs=inputs, distillation={"teacher_weights": {"klip": 2}}))


def test_the_plan_says_what_the_pixels_of_each_input_cost(caches: list[Path], tmp_path: Path) -> None:
    stated = recipe(caches, tmp_path)
    (tmp_path / "recipe.yaml").write_text(json.dumps(stated.model_dump(mode="json")))
    words = ["train", str(tmp_path / "recipe.yaml"), "--dry-run"]
    told = " ".join(CliRunner().invoke(app, words, env={"COLUMNS": "400"}).output.split())
    for place in caches:
        nbytes = human_bytes(pixel_bytes(FeatureCache.open(place).spec))
        assert f"{nbytes} a view" in told


def test_a_teacher_of_two_inputs_and_one_that_a_cache_lacks_are_refused(
    caches: list[Path], tmp_path: Path
) -> None:
    inputs: list[dict[str, Any]] = [
        {"cache": str(caches[0]), "batch_size_per_process": 2},
        {"cache": str(caches[0]), "batch_size_per_process": 2, "teachers": ["clip", "sam"]},
    ]
    with pytest.raises(RecipeError, match=r"sam(.|\n)*one input only(.|\n)*clip in several inputs"):
        train(recipe(caches, tmp_path, inputs=inputs))
