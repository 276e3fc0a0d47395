"""A student in CLIP's place: logits held to the whole CLIP's, accuracy to a count, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from teachercache import FeatureCache, build, build_student
from teachercache.cache_builder.teachers.timm_teacher import TimmTeacher
from teachercache.jobs.cli import app
from teachercache.jobs.cli.zero_shot import _require_weights
from teachercache.pipeline.errors import CacheMismatchError, RecipeError, WeightsNotFoundError
from teachercache.pipeline.records.strict import Size
from teachercache.pipeline.sources import open_source
from teachercache.pipeline.stores.feature_store import CLS_TOKEN
from teachercache.pipeline.views import render_view
from teachercache.student.kpu.latent_space import Features
from teachercache.student.zero_shot.classification import (
    TEMPLATES,
    classify,
    read_classes,
    read_templates,
    require_clip,
)
from teachercache.student.zero_shot.clip import Clip
from tests.make_cache import build_recipe, make_images
from tests.tiny_clip import SIZE, WIDTH, save_clip, save_vision

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

CLASSES = {"cats": "cat", "dogs": "dog", "trees": "tree"}
GRIDS: dict[str, Size] = {"clip": (4, 4), "other": (4, 4)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    TimmTeacher.models.cache_clear()
    return save_clip(tmp_path_factory.mktemp("clip") / "whole")


@pytest.fixture(scope="module")
def clip(folder: Path) -> Clip:
    return Clip.load(str(folder))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for number, name in enumerate(CLASSES):
        make_images(root / name, 2, seed=number)
    return root


@pytest.fixture(scope="module")
def cache(clip: Clip, images: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    """The vision tower's class tokens, by a teacher of timm with the same weights."""
    place = tmp_path_factory.mktemp("cache")
    checkpoint = save_vision(clip.vision_weights(), place / "vision.safetensors")
    keys = {"model": "vit_tests_clip", "checkpoint": checkpoint, "codec": "f32", "cls_token": True}
    views = {"policy": "imagenet_eval", "num_views": 1, "size": [SIZE, SIZE]}
    recipe = build_recipe(
        place / "cache", images, teachers={"clip": keys | {"block_indices": [1]}}, views=views
    )
    return build(recipe, Console(quiet=True)).cache


def student(kind: str = "kpu", **changes: Any) -> Any:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"stem": "test_vit", "teacher_dims": {"clip": WIDTH, "other": WIDTH}}
    arguments |= {"image_size": (SIZE, SIZE)}
    if kind == "kpu":
        arguments |= {"teacher_grids": GRIDS, "class_tokens": ["clip"]}
    return build_student(kind, **arguments | changes)


def pixels(cache: FeatureCache) -> Tensor:
    return torch.stack([render_view(cache.image(row), cache.view(row)) for row in range(6)])


def test_with_the_cached_token_logits_are_those_of_the_whole_clip(clip: Clip, cache: FeatureCache) -> None:
    spec = cache.spec.teachers["clip"]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    read = clip.tokenizer([f"a photo of a {name}." for name in CLASSES.values()], return_tensors="pt")
    with torch.no_grad():
        whole = clip.model(pixel_values=(pixels(cache) / 255 - mean) / std, **read)
    tokens_BC = cache.read_tokens(range(6), "clip", CLS_TOKEN)[:, -1].float()
    logits = clip.logits(tokens_BC, clip.embed(list(CLASSES.values()), TEMPLATES))
    torch.testing.assert_close(logits, whole.logits_per_image, rtol=1e-5, atol=1e-5)
    assert logits.std(dim=0).min() > 1e-3


def test_templates_count_alike(clip: Clip) -> None:
    templates = ["a photo of a {}.", "a drawing of a {}."]
    alone = [clip.embed(["cat", "dog"], [template]) for template in templates]
    together = clip.embed(["cat", "dog"], templates)
    torch.testing.assert_close(together, F.normalize((alone[0] + alone[1]) / 2, dim=1))


def test_accuracy_is_the_share_of_images_whose_folder_names_the_best_class(
    clip: Clip, cache: FeatureCache, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kpu, tokens_BC = student(), cache.read_tokens(range(6), "clip", CLS_TOKEN)[:, -1].float()
    monkeypatch.setattr(kpu, "project", lambda *_: {"clip": Features(tokens_BC, tokens_BC)})
    found = classify(kpu, open_source(images), clip, CLASSES)
    chances_BK = clip.logits(tokens_BC, clip.embed(list(CLASSES.values()), TEMPLATES)).softmax(1)
    best = [list(CLASSES)[int(place)] for place in chances_BK.argmax(1)]
    assert [one["class_1"] for one in found.images] == best
    assert [one["probability_1"] for one in found.images] == pytest.approx(chances_BK.amax(1).tolist())
    assert [one["label"] for one in found.images] == ["cats", "cats", "dogs", "dogs", "trees", "trees"]
    right = sum(one["label"] == one["class_1"] for one in found.images)
    assert found.top1 == pytest.approx(100 * right / 6)
    assert (found.labelled, found.top5) == (6, 100)
    renamed = {best[0]: "cat", "another": "dog"}  # labels of some images alone
    assert classify(kpu, open_source(images), clip, renamed).labelled == 2


def test_a_student_says_what_its_own_tokens_say(clip: Clip, cache: FeatureCache, images: Path) -> None:
    kpu = student(image_size=(64, 64), image_sizes={"clip": (SIZE, SIZE)})  # CLIP had images of its own
    found = classify(kpu, open_source(images), clip, CLASSES, batch_size=4)
    with torch.no_grad():
        token_BC = kpu.project(kpu.normalize(pixels(cache)))["clip"].image
    chances_BK = clip.logits(token_BC, clip.embed(list(CLASSES.values()), TEMPLATES)).softmax(1)
    expected = chances_BK.amax(1).tolist()
    assert [one["probability_1"] for one in found.images] == pytest.approx(expected, abs=1e-5)


def test_images_without_labels_have_no_accuracy(clip: Clip, tmp_path: Path) -> None:
    found = classify(student(), open_source(make_images(tmp_path / "plain", 1)), clip, CLASSES)
    assert found.labelled == 0
    assert "top-1" not in found.markdown()


def test_a_clip_of_another_width_is_refused(tmp_path: Path) -> None:
    other = Clip.load(str(save_clip(tmp_path / "other", width=2 * WIDTH)))
    with pytest.raises(RecipeError, match=rf"teacher clip(.|\n)*{2 * WIDTH} channels(.|\n)*{WIDTH} channels"):
        require_clip(student(), other)


def test_a_clip_with_other_weights_is_refused(
    clip: Clip, cache: FeatureCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(cache.storage.url)
    _require_weights(None, ["clip"], clip)
    assert "not compared with those of clip: name the student's --cache" in capsys.readouterr().err
    _require_weights(place, ["clip"], clip)
    assert not capsys.readouterr().err
    other = Clip.load(str(save_clip(tmp_path / "other", seed=1)))
    with pytest.raises(CacheMismatchError, match="not the weights of vit_tests_clip"):
        _require_weights(place, ["clip"], other)


@pytest.mark.parametrize(
    ("one", "teacher"),
    [
        pytest.param(lambda: student("sak"), None, id="no class token"),
        pytest.param(lambda: student(class_tokens=[]), None, id="no teacher with one"),
        pytest.param(lambda: student(class_tokens=["clip", "other"]), None, id="which of two"),
        pytest.param(lambda: student(), "other", id="another teacher"),
    ],
)
def test_a_student_without_the_token_is_refused(clip: Clip, one: Any, teacher: str | None) -> None:
    with pytest.raises(RecipeError, match="no class token to classify by"):
        require_clip(one(), clip, teacher)
    assert require_clip(student(class_tokens=["clip", "other"]), clip, "other") == "other"


def test_what_is_no_whole_clip_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFoundError, match=r"no CLIPModel to load from .*/nowhere"):
        Clip.load(str(tmp_path / "nowhere"))
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(folder / "model.safetensors")
    del state["text_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsNotFoundError, match=r"1 missing weights: text_projection\.weight"):
        Clip.load(str(tmp_path / "model.safetensors"))


def test_classes_have_names_and_labels(tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("n01440764\ttench\n\ngoldfish, Carassius\n")
    assert read_classes(file) == {"n01440764": "tench", "goldfish, Carassius": "goldfish, Carassius"}


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("cat\ndog\ncat\n", "twice cat"),
        ("a\tcat\nb\tcat\n", "twice cat"),
        ("cat\n", "1 classes"),
        ("", "0 classes"),
    ],
)
def test_lists_with_doubles_or_too_few_classes_are_refused(tmp_path: Path, text: str, got: str) -> None:
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(RecipeError, match=f"not a list of classes(.|\n)*{got}"):
        read_classes(tmp_path / "classes.txt")


@pytest.mark.parametrize("text", ["a photo", "{} and {}", ""])
def test_templates_have_one_place_for_the_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "templates.txt").write_text(f"a {{}}.\n{text}\n" if text else text)
    with pytest.raises(RecipeError, match="not a list of templates"):
        read_templates(tmp_path / "templates.txt")
    with pytest.raises(RecipeError, match=r"none\.txt cannot be read"):
        read_templates(tmp_path / "none.txt")


def test_the_command_prints_a_table_and_writes_both_files(
    folder: Path, images: Path, cache: FeatureCache, tmp_path: Path
) -> None:
    student().save_pretrained(tmp_path / "student")
    (tmp_path / "student/README.md").write_text("---\nteacher_licences: {clip: random weights}\n---\n")
    (tmp_path / "classes.txt").write_text("".join(f"{label}\t{name}\n" for label, name in CLASSES.items()))
    words = ["zeroshot", "classify", str(tmp_path / "student"), str(images), "--clip", str(folder)]
    words += ["--classes", str(tmp_path / "classes.txt"), "--cache", str(cache.storage.url)]
    done = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "found")], env={"COLUMNS": "400"})
    assert done.exit_code == 0, done.output
    assert "student (random weights): 6 images, 3 classes; top-1 " in done.output
    assert "cats/image_000" in done.output
    record = json.loads((tmp_path / "found/classes.json").read_text())
    assert [one["key"] for one in record["images"]] == cache.samples["key"].to_pylist()
    lines = (tmp_path / "found/classes.csv").read_text().splitlines()
    assert lines[0].replace('"', "").startswith("key,label,class_1,probability_1")
    assert len(lines) == 7
