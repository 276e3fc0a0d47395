"""Decoders on a student's features and on cached ones: what they learn, where a run goes on, what is
refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.classification import MulticlassJaccardIndex
from typer.testing import CliRunner

from teachercache.jobs.cli import app
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import CheckpointError, RecipeError
from teachercache.pipeline.records.view_policy import ViewPolicy
from teachercache.pipeline.views import draw_view, render_view
from teachercache.student.build import build_student, load_student
from teachercache.student.datasets import open_dataset
from teachercache.student.datasets.scenes import write_scenes
from teachercache.student.decoders.model import Decoders, load_decoders, load_student_at, require_paper
from teachercache.student.measuring.decoder_scores import evaluate_decoder, scores_table
from teachercache.student.training.decoder_recipe import DecoderRecipe
from teachercache.student.training.train_decoders import decoders_of, sources_of, train_decoders
from teachercache.student.training.train_plan import make_decoder_plan
from tests.make_cache import make_cache, teacher_spec
from tests.train_recipes import forget_accelerate, logged

SIZE = 64, 64
TINY = {"width": 32, "heads": 2, "encoder_layers": 1, "layers": 1, "queries": 8, "denoising": 4, "points": 64}
MASK_DINO = {"kind": "mask_dino", "options": TINY}
UPERNET = {"kind": "upernet", "options": {"width": 8, "auxiliary_width": 8}}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, train=6, val=3, size=SIZE)
    return root


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("students")
    kpu: dict[str, Any] = {"teacher_grids": {"clip": (2, 2)}, "class_tokens": ["clip"]}
    kinds = {"kpu": kpu, "sak": {}, "kpu of two sizes": {**kpu, "image_sizes": {"clip": (32, 32)}}}
    for kind, more in kinds.items():
        torch.manual_seed(0)
        student = build_student(
            kind.split()[0], stem="test_vit", teacher_dims={"clip": 8}, image_size=(48, 48), **more
        )
        student.save_pretrained(folder / kind)
    return {kind: folder / kind for kind in kinds}


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    forget_accelerate()
    yield
    forget_accelerate()


def recipe(root: Path, output: Path, decoders: dict[str, Any], **changes: Any) -> DecoderRecipe:
    dataset = {"dataset": {"kind": "scenes", "root": str(root)}, "batch_size_per_process": 2}
    content = {
        "output": str(output),
        "image_size": SIZE,
        "decoders": {name: dataset | one for name, one in decoders.items()},
        "schedule": {"max_steps": 4},
        "mixed_precision": "no",
        "checkpoint_every_steps": 2,
        "trackers": [],
        "loader": {"threads": 1},
    }
    return DecoderRecipe.model_validate(content | changes)


@pytest.mark.parametrize(
    ("kind", "learns"), [("kpu", False), ("kpu of two sizes", True), ("sak", False), ("sak", True)]
)
def test_decoders_of_a_student_learn_side_by_side(
    scenes: Path, students: dict[str, Path], tmp_path: Path, kind: str, learns: bool
) -> None:
    three = {"scene": UPERNET, "things": MASK_DINO, "kind": {"kind": "linear"}}
    run = recipe(scenes, tmp_path, three, student=str(students[kind]), learns=learns)
    result = train_decoders(run)
    assert result.steps == 4
    terms = [
        logged(tmp_path, f"loss/{name}")
        for name in ("scene/cross_entropy", "things/dice", "kind/cross_entropy")
    ]
    assert all(len(term) == 4 for term in terms)
    decoders = load_decoders(tmp_path / "decoders")
    images = torch.zeros(1, 3, *SIZE, dtype=torch.uint8)
    assert decoders.predict("scene", images).shape == (1, 11, *SIZE)
    assert decoders.predict("kind", images).shape == (1,)
    printed = CliRunner().invoke(
        app,
        ["evaluate", str(tmp_path / "decoders"), "scenes", str(scenes), "--json", "--threads", "1"],
    )
    scores = json.loads(printed.output)
    assert {name.split()[-1] for name in scores["things"]} == {"boxes", "masks"}
    assert [list(scores[name]) for name in ("scene", "kind")] == [["mIoU"], ["top-1"]]


def test_a_frozen_student_stays_as_it_was_and_a_learnt_one_is_saved(
    scenes: Path, students: dict[str, Path], tmp_path: Path
) -> None:
    before = load_student(students["kpu"]).state_dict()
    for learns in (False, True):
        output = tmp_path / str(learns)
        train_decoders(
            recipe(scenes, output, {"scene": UPERNET}, student=str(students["kpu"]), learns=learns)
        )
        forget_accelerate()
        student = load_decoders(output / "decoders").student
        assert student is not None
        after = student.state_dict()
        same = [torch.equal(after[name], one) for name, one in before.items() if "pos_embed" not in name]
        assert all(same) != learns
        assert (output / "student").exists() == learns


def test_a_run_that_was_cut_off_goes_on_bit_by_bit(
    scenes: Path, students: dict[str, Path], tmp_path: Path
) -> None:
    two = {"scene": UPERNET, "things": MASK_DINO}

    def run(output: Path, **changes: Any) -> dict[str, Tensor]:
        train_decoders(recipe(scenes, output, two, student=str(students["kpu"]), learns=True, **changes))
        forget_accelerate()
        return load_file(output / "checkpoints/step_00000004/model.safetensors")

    whole = run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole/checkpoints/step_00000002", tmp_path / "cut/checkpoints/step_00000002")
    again = run(tmp_path / "cut")
    assert whole.keys() == again.keys()
    assert all(torch.equal(one, again[name]) for name, one in whole.items())
    with pytest.raises(CheckpointError, match=r"optimizer\.lr"):
        run(tmp_path / "whole", optimizer={"lr": 0.5})
    with pytest.raises(CheckpointError, match="resume is false"):
        run(tmp_path / "whole", resume=False)
    shutil.rmtree(tmp_path / "whole/checkpoints")
    with pytest.raises(CheckpointError, match="the decoders of a finished run"):
        run(tmp_path / "whole")


def test_an_accumulated_step_is_one_of_the_whole_batch(
    scenes: Path, students: dict[str, Path], tmp_path: Path
) -> None:
    for name, batch, accumulated in (("whole", 2, 1), ("parts", 1, 2)):
        one = {"kind": {"kind": "linear", "batch_size_per_process": batch}}
        more: dict[str, Any] = {"gradient_accumulation_steps": accumulated, "schedule": {"epochs": 1}}
        train_decoders(recipe(scenes, tmp_path / name, one, student=str(students["sak"]), **more))
        forget_accelerate()
    assert len(logged(tmp_path / "whole")) == 3  # of six scenes
    assert logged(tmp_path / "parts") == pytest.approx(logged(tmp_path / "whole"), rel=1e-4)


@pytest.fixture(scope="module")
def cached(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("caches")
    one_level = {"block_indices": (3,)}
    teachers = {"clip": teacher_spec(cls_token=True), "dinov2": teacher_spec(width=4, grid=3)}
    teachers["last of clip"] = teacher_spec(cls_token=True).model_copy(update=one_level)
    for grid in (2, 8, 1, 4):  # in no order
        teachers[f"gdino of {grid}"] = teacher_spec(grid=grid).model_copy(update=one_level)
    made = {
        "train": make_cache(folder / "train", scenes / "images/train", teachers=teachers, view_size=SIZE),
        "val": make_cache(
            folder / "val",
            scenes / "images/val",
            teachers=teachers,
            view_size=SIZE,
            policy="multitask_eval",
            num_views=1,
        ),
    }
    return {split: cache.storage.url for split, cache in made.items()}


def test_decoders_of_cached_teachers_learn_and_are_measured(
    scenes: Path, cached: dict[str, str], tmp_path: Path
) -> None:
    decoders = {
        name: one | {"cache": cached["train"], "teachers": ["clip", "dinov2"]}
        for name, one in (("scene", UPERNET), ("things", MASK_DINO))
    }
    train_decoders(recipe(scenes, tmp_path, decoders))
    assert len(logged(tmp_path, "loss/scene/auxiliary")) == 4
    loaded, data = load_decoders(tmp_path / "decoders"), open_dataset("scenes", scenes, "val")
    assert loaded.made_of["scene"]["teachers"] == ["clip", "dinov2"]
    scores = evaluate_decoder(loaded, "scene", data, cache=FeatureCache.open(cached["val"]))
    assert 0 <= scores["mIoU"] <= 100
    assert "AP of masks" in evaluate_decoder(loaded, "things", data, cache=FeatureCache.open(cached["val"]))
    with pytest.raises(RecipeError, match="other views"):
        evaluate_decoder(loaded, "scene", data, cache=FeatureCache.open(cached["train"]))
    with pytest.raises(RecipeError, match="no cache"):
        evaluate_decoder(loaded, "scene", data)


@pytest.mark.parametrize(
    ("teachers", "widths"),
    [
        (["dinov2"], [4, [4] * 4]),
        (["last of clip"], [8, [8]]),
        ([f"gdino of {grid}" for grid in (2, 8, 1, 4)], [4 * 8, [8] * 4]),
    ],
)
def test_decoders_of_each_teacher_of_kpu_learn_from_its_cached_maps(
    scenes: Path, cached: dict[str, str], tmp_path: Path, teachers: list[str], widths: list[Any]
) -> None:
    """The rows DINOv2†, CLIP† and GroundingDINO† of Table 1."""
    kinds: dict[str, dict[str, Any]] = {"scene": UPERNET, "things": MASK_DINO, "kind": {"kind": "linear"}}
    decoders = {name: one | {"cache": cached["train"], "teachers": teachers} for name, one in kinds.items()}
    run = recipe(scenes, tmp_path, decoders)
    sources = sources_of(run, 0, 1, torch.device("cpu"))
    made = decoders_of(run, sources)
    assert all(content["widths"] == widths for content in made.made_of.values())
    with ExitStack() as stack:
        batches = {name: next(source.batches(0, stack)) for name, source in sources.items()}
    inputs = {
        name: (sources[name].inputs(one), one.labels[sources[name].task]) for name, one in batches.items()
    }
    sum(made(inputs).values()).backward()
    assert all(one.grad is not None for one in made.parameters())
    if len(teachers) > 1:
        grids = [one.shape[2:] for one in made.represent(inputs["scene"][0]).maps]
        assert grids == [(8, 8), (4, 4), (2, 2), (1, 1)]


def test_teachers_with_other_numbers_of_levels_are_not_read_side_by_side(
    scenes: Path, cached: dict[str, str], tmp_path: Path
) -> None:
    teachers = ["dinov2", "last of clip"]
    one = UPERNET | {"cache": cached["train"], "teachers": teachers}
    with pytest.raises(RecipeError, match="last of clip cannot be an expert"):
        train_decoders(recipe(scenes, tmp_path, {"scene": one}))


def test_scores_are_those_of_predictions_at_the_size_of_the_images(
    scenes: Path, students: dict[str, Path], tmp_path: Path
) -> None:
    """mIoU against torchmetrics, top-1 by counting; images of 64 pixels in views of 96."""
    two = {"scene": UPERNET, "kind": {"kind": "linear"}}
    train_decoders(recipe(scenes, tmp_path, two, student=str(students["sak"]), image_size=(96, 96)))
    decoders, data = load_decoders(tmp_path / "decoders"), open_dataset("scenes", scenes, "val")
    reference = MulticlassJaccardIndex(11, average="none", zero_division=torch.nan)
    right = list[bool]()
    for number in range(3):
        image, labels = data.image(number), data.labels(number, ["semseg", "class"])
        padded = torch.full((1, 3, 96, 96), 0, dtype=torch.uint8)
        view = draw_view(ViewPolicy(policy="multitask_eval", size=(96, 96)), "any", 64, 64, 0)
        padded[0] = render_view(image, view)
        logits = decoders.predict("scene", padded)[..., 16:80, 16:80]
        reference.update(logits.argmax(1), torch.from_numpy(labels["semseg"])[None])
        view = draw_view(ViewPolicy(policy="imagenet_eval", size=(96, 96)), "any", 64, 64, 0)
        right.append(bool(decoders.predict("kind", render_view(image, view)[None]) == int(labels["class"])))
    found = evaluate_decoder(decoders, "scene", data, batch_size=2)
    assert found["mIoU"] / 100 == pytest.approx(float(reference.compute().nanmean()), abs=1e-6)
    assert evaluate_decoder(decoders, "kind", data)["top-1"] == pytest.approx(100 * sum(right) / 3)


def test_the_plan_says_what_the_run_takes_and_runs_nothing(
    scenes: Path, students: dict[str, Path], tmp_path: Path
) -> None:
    three = {"scene": UPERNET, "things": MASK_DINO, "kind": {"kind": "linear"}}
    student = load_student_at(students["kpu"], SIZE)
    with FlopCounterMode(display=False) as counter:
        Decoders({}, SIZE, student).represent(torch.zeros(1, 3, *SIZE).byte())
    plans = {}
    for learns in (False, True):
        run = recipe(scenes, tmp_path / "run", three, student=str(students["kpu"]), learns=learns)
        plans[learns] = make_decoder_plan(run, processes=2, tflops_per_gpu=100)
    features = counter.get_total_flops() / 2e9
    frozen, learnt = plans[False].size, plans[True].size
    assert frozen.gmacs_by_part["student"] == pytest.approx(features)
    assert learnt.train_gmacs - frozen.train_gmacs == pytest.approx(2 * features)
    assert frozen.train_gmacs == pytest.approx(3 * frozen.gmacs - 2 * features)
    assert frozen.parameters["student"] == sum(one.numel() for one in student.parameters())
    assert frozen.trained == frozen.num_parameters - frozen.parameters["student"] < learnt.trained
    (tmp_path / "recipe.yaml").write_text(json.dumps(run.model_dump(mode="json")))
    told = CliRunner().invoke(app, ["train-decoders", str(tmp_path / "recipe.yaml"), "--dry-run"])
    assert "4 of 6 images, 24 in all" in told.output
    assert "things 2 of 6 images of scenes" in told.output
    assert not (tmp_path / "run").exists()


def test_what_could_not_be_measured_is_a_dash() -> None:
    assert "| mine | 0.00 | – |" in scores_table({"mine": {"APs of boxes": 0.0, "APl of boxes": -100.0}})


def test_the_rows_of_kpu_are_of_decoders_and_a_student_is_told_how_to_get_there(
    scenes: Path, students: dict[str, Path]
) -> None:
    student = str(students["kpu"])
    with pytest.raises(RecipeError, match=rf"train-decoders kpu_decoders_frozen student={student}"):
        CliRunner().invoke(
            app, ["evaluate", student, "scenes", str(scenes), "--paper", "kpu"], catch_exceptions=False
        )
    with pytest.raises(CheckpointError, match="There is no such student"):
        require_paper(f"{student}/elsewhere", "kpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": "kpu", "image_size": (60, 64)}, "multiples of 32"),
        (
            {"student": "kpu", "decoders": {"a": {"kind": "upernet", "options": {"widht": 8}}}},
            "did you mean width",
        ),
        ({"student": "kpu", "decoders": {"a": {"kind": "linear", "dataset": "nyud"}}}, "images with class"),
        (
            {"student": "kpu", "decoders": {"a": {"kind": "mask_dino", "options": {"width": 48}}}},
            "multiple of 32",
        ),
        ({"student": "kpu", "loader": {"kind": "stream"}}, "random order"),
        (
            {
                "student": "kpu",
                "image_size": (6, 6),
                "decoders": {"a": {"kind": "linear", "dataset": "nyud"}},
            },
            r"2 problems(.|\n)*multiples of 32(.|\n)*images with class",
        ),
        ({}, "needs a cache"),
        ({"student": "kpu", "decoders": {"a": UPERNET | {"batch_size_per_process": 1}}}, "2 images or more"),
        ({"student": "kpu", "decoders": {"a": UPERNET | {"cache": "c"}}}, "leave out the decoders' caches"),
    ],
)
def test_what_cannot_be_trained_is_said_before_anything_is_loaded(
    scenes: Path, students: dict[str, Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    content: dict[str, Any] = {"decoders": {"a": dict(UPERNET)}} | changes
    if content["decoders"]["a"].get("dataset") == "nyud":
        root = tmp_path / "nyud"
        (root / "gt_sets").mkdir(parents=True)
        (root / "gt_sets/train.txt").write_text("0001\n")
        content["decoders"]["a"]["dataset"] = {"kind": "nyud", "root": str(root)}
    if "student" in content:
        content["student"] = str(students[content["student"]])
    with pytest.raises((RecipeError, ValueError), match=message):
        train_decoders(recipe(scenes, tmp_path / "run", **content))
    assert not (tmp_path / "run").exists()
