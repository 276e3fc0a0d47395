"""A student in the place of GroundingDINO's image side: boxes as the whole model's, precision as COCO's."""

# ruff: noqa: F811  fixtures of another module
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from teachercache import build, build_student
from teachercache.cache_builder.teachers import TeacherRecipe, build_teacher, resolve_teacher
from teachercache.jobs.cli import app
from teachercache.jobs.cli.zero_shot import _require_weights
from teachercache.pipeline.errors import CacheMismatchError, RecipeError, WeightsNotFoundError
from teachercache.pipeline.sources import open_source
from teachercache.pipeline.views import PADDING
from teachercache.student.kpu.latent_space import Features
from teachercache.student.kpu.model import KPU
from teachercache.student.zero_shot.detection import CocoAnnotations, detect, find, require_maps
from teachercache.student.zero_shot.detector import Detector, read_prompt
from tests.make_cache import build_recipe, make_images
from tests.tiny_clip import save_clip
from tests.tiny_grounding_dino import TINY, folder, tiny_model, whole  # noqa: F401

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

SIZE = (96, 160)
MAPS = {"third": (3, 5), "first": (12, 20), "second": (6, 10), "fourth": (2, 3)}  # in no order
MEAN, STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PHRASES = ["red cats", "dog"]


@pytest.fixture(scope="module")
def detector(folder: Path) -> Detector:
    return Detector.load(str(folder))


def student(**changes: Any) -> KPU:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"stem": "test_vit", "teacher_dims": dict.fromkeys(MAPS, 256) | {"clip": 8}}
    arguments |= {"image_size": SIZE, "teacher_grids": MAPS | {"clip": (4, 4)}, "class_tokens": ["clip"]}
    built = build_student("kpu", **arguments | changes)
    assert isinstance(built, KPU)
    return built


def expected(whole: Any, detector: Detector, pixels: Tensor, shown_BHW: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes and scores of the whole model, the tokens of each phrase found by the eye."""
    ids = detector.tokenizer("red cats. dog.", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [[101, 1042, 1040, 1044, 1012, 1041, 1012, 102]]
    with torch.no_grad():
        found = whole(pixel_values=pixels, pixel_mask=shown_BHW, input_ids=ids.expand(len(pixels), -1))
    chances = found.logits.sigmoid()
    return found.pred_boxes, torch.stack([chances[..., 1:4].mean(-1), chances[..., 5]], dim=-1)


def test_with_the_teachers_maps_boxes_are_those_of_the_whole_model(
    whole: Any, folder: Path, detector: Detector
) -> None:
    values = torch.arange(2 * 3 * SIZE[0] * SIZE[1]).view(2, 3, *SIZE)
    views = ((values * 7919 + values // 97) % 256).to(torch.uint8)
    maps = []
    for index in range(4):
        recipe = TeacherRecipe(model=TINY, checkpoint=str(folder), block_indices=(index,))
        cached = build_teacher(resolve_teacher("t", recipe, SIZE))(views).feature_maps_BSHWC
        maps.append(cached[:, 0].permute(0, 3, 1, 2))
    shown_BHW = torch.ones(2, *SIZE, dtype=torch.long)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    boxes, scores = expected(whole, detector, (views / 255 - mean) / std, shown_BHW)
    torch.testing.assert_close(detector(maps, shown_BHW, PHRASES), (boxes, scores), rtol=1e-4, atol=1e-4)
    assert boxes.std(dim=1).min() > 1e-4
    other = detector([one.flip(3) for one in maps], shown_BHW, PHRASES)[0]
    assert not torch.allclose(other, boxes, atol=1e-4)


def test_an_image_is_fitted_and_its_padding_is_masked(
    whole: Any, detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole model's own maps of the very pixels; an image of half the student's height fills its top."""
    kpu = student(image_size=(32, 32), image_sizes=dict.fromkeys(MAPS, SIZE))
    kpu.mean, kpu.std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))

    def project(pixels: Tensor, _: object) -> dict[str, Features]:
        stages = whole.model.backbone.conv_encoder.model(pixels).feature_maps
        maps = zip(whole.model.input_proj_vision, (*stages, stages[-1]), strict=True)
        found = [part(stage) for part, stage in maps]
        return {
            name: Features(None, one)
            for name, one in zip(("first", "second", "third", "fourth"), found, strict=True)
        }

    monkeypatch.setattr(kpu, "project", project)
    values = np.random.default_rng(0).integers(0, 256, (SIZE[0] // 2, SIZE[1], 3), np.uint8)
    canvas = torch.tensor(PADDING, dtype=torch.uint8)[:, None, None].repeat(1, *SIZE)
    canvas[:, : SIZE[0] // 2] = torch.from_numpy(values).permute(2, 0, 1)
    shown_BHW = torch.zeros(1, *SIZE, dtype=torch.long)
    shown_BHW[:, : SIZE[0] // 2] = 1
    boxes, scores = expected(whole, detector, kpu.normalize(canvas[None]), shown_BHW)
    (found,) = find(kpu, [Image.fromarray(values)], detector, PHRASES)
    assert len(found) == 6  # three queries, two phrases
    best = scores.flatten().sort(descending=True).values.tolist()
    assert [box.score for box in found] == pytest.approx(best)
    places = scores.flatten().argsort(descending=True)
    assert [box.phrase for box in found] == (places % 2).tolist()
    x, y, width, height = boxes[0, int(places[0]) // 2].tolist()
    left, top, right, bottom = x - width / 2, y - height / 2, x + width / 2, y + height / 2
    sides = max(left, 0), max(top, 0), min(right, 1) - max(left, 0), min(bottom, 1) - max(top, 0)
    in_pixels = [side * length for side, length in zip(sides, (160, 48, 160, 48), strict=True)]
    assert found[0].bbox == pytest.approx(in_pixels, abs=1e-2)
    everywhere = expected(whole, detector, kpu.normalize(canvas[None]), torch.ones_like(shown_BHW))[0]
    assert not torch.allclose(everywhere, boxes, atol=1e-3)  # the mask does something


def test_maps_go_from_fine_to_coarse(detector: Detector) -> None:
    assert require_maps(student(), detector) == ["first", "second", "third", "fourth"]


def test_a_student_without_the_four_maps_is_refused(detector: Detector) -> None:
    three = dict.fromkeys(("first", "second", "third"), 256)
    sak = build_student("sak", stem="test_vit", teacher_dims=dict.fromkeys(MAPS, 256), image_size=(32, 32))
    five = student(teacher_dims=dict.fromkeys((*MAPS, "clip"), 256))
    sizes = student(image_sizes={"first": (64, 64)})
    for one in (student(teacher_dims=three | {"clip": 8}), five, sizes, sak):
        with pytest.raises(RecipeError, match=rf"(?s)the maps.*a {one.kind};.*a KPU of 4 teachers"):
            require_maps(one, detector)


@pytest.mark.parametrize("prompt", ["", ". .", "cat. ?!.", "cat. Cat."])
def test_a_prompt_names_things_once(prompt: str) -> None:
    with pytest.raises(RecipeError, match="does not say what to look for"):
        read_prompt(prompt)
    assert read_prompt("Red cats. dog") == PHRASES


def test_a_prompt_that_is_too_long_is_refused(detector: Detector) -> None:
    with pytest.raises(RecipeError, match=r"(?s)too long.*602 tokens.*256 at most"):
        detector([], torch.ones(1, *SIZE), ["cat"] * 300)


def test_a_phrase_with_a_full_stop_is_one_phrase(detector: Detector) -> None:
    maps = [torch.randn(1, 256, *MAPS[name]) for name in ("first", "second", "third", "fourth")]
    shown_BHW = torch.ones(1, *SIZE, dtype=torch.long)
    boxes, scores = detector(maps, shown_BHW, ["red. cats", "dog"])
    expected = detector(maps, shown_BHW, PHRASES)
    assert scores.shape[2] == 2
    torch.testing.assert_close((boxes, scores), expected)


def test_what_is_no_grounding_dino_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFoundError, match="no GroundingDinoForObjectDetection to load"):
        Detector.load(str(save_clip(tmp_path / "clip")))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "val", 3)


@pytest.fixture(scope="module")
def coco(images: Path) -> Path:
    """Two of the three images, and one that is not there; boxes drawn at random."""
    generator = np.random.default_rng(0)
    file = images.parent / "instances.json"
    names = ("image_000.jpg", "image_002.jpg", "elsewhere.jpg")
    content: dict[str, Any] = {
        "images": [
            {"id": 70 + n, "file_name": name, "width": 64, "height": 48} for n, name in enumerate(names)
        ],
        "categories": [{"id": 5, "name": "Red cats"}, {"id": 9, "name": "dog"}],
        "annotations": [],
    }
    for n in range(12):
        box = [*generator.uniform(0, 30, 2).tolist(), *generator.uniform(5, 18, 2).tolist()]
        facts = {"id": n + 1, "image_id": 70 + n % 2, "category_id": (5, 9)[n % 3 == 0], "iscrowd": 0}
        content["annotations"].append(facts | {"bbox": box, "area": box[2] * box[3]})
    file.write_text(json.dumps(content))
    return file


def test_average_precision_is_that_of_pycocotools(coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, generator = CocoAnnotations(coco), np.random.default_rng(1)
    content = json.loads(coco.read_text())
    content["images"] = content["images"][:2]
    for one in content["annotations"]:  # near the truth, and some that are far
        one["bbox"] = (np.array(one["bbox"]) + generator.normal(0, 1.5, 4)).clip(1).tolist()
        one["score"] = float(generator.uniform())
    expected = COCO(str(coco))
    reference = COCOeval(expected, expected.loadRes(content["annotations"]), "bbox")
    reference.params.imgIds = [70, 71]
    for step in (reference.evaluate, reference.accumulate, reference.summarize):
        step()
    found = truth.average_precision(content)
    assert list(found.values()) == pytest.approx((100 * reference.stats[:6]).tolist(), abs=1e-6)
    assert 5 < found["AP"] < 95
    dogs = content | {"categories": content["categories"][1:]}
    dogs["annotations"] = [one for one in content["annotations"] if one["category_id"] == 9]
    reference.params.catIds = [9]
    for step in (reference.evaluate, reference.accumulate, reference.summarize):
        step()
    assert list(truth.average_precision(dogs).values()) == pytest.approx(
        (100 * reference.stats[:6]).tolist(), abs=1e-6
    )


def test_annotated_images_alone_are_looked_at_and_scored(
    detector: Detector, images: Path, coco: Path, tmp_path: Path
) -> None:
    truth = CocoAnnotations(coco)
    found = detect(student(), open_source(images), detector, PHRASES, tmp_path, annotations=truth)
    content = json.loads((tmp_path / "detections.json").read_text())
    named = {one["id"]: one["file_name"] for one in content["images"]}
    assert named == {70: "image_000.jpg", 71: "image_002.jpg"}
    assert content["categories"] == [{"id": 5, "name": "red cats"}, {"id": 9, "name": "dog"}]
    assert (found["images"], found["boxes"]) == (2, 2 * 3 * 2)
    assert found["annotated images that are not there"] == 1
    assert {one["category_id"] for one in content["annotations"]} == {5, 9}
    assert 0 <= found["AP"] <= 100
    assert {file.name for file in tmp_path.glob("*.png")} == {"image_000.png", "image_002.png"}


def test_annotations_of_others_are_refused(images: Path, coco: Path, tmp_path: Path) -> None:
    truth = CocoAnnotations(coco)
    with pytest.raises(RecipeError, match=r"(?s)annotates other things.*tree.*red cats, dog"):
        truth.require(["dog", "tree"], ["image_000"])
    with pytest.raises(RecipeError, match=r"(?s)annotates other images.*photo.*image_000"):
        truth.require(["dog"], ["photo"])


def test_two_images_of_one_annotated_name_are_refused(
    detector: Detector, images: Path, coco: Path, tmp_path: Path
) -> None:
    for place in ("a", "b"):
        shutil.copytree(images, tmp_path / "both" / place)
    source, truth = open_source(tmp_path / "both"), CocoAnnotations(coco)
    with pytest.raises(RecipeError, match=r"(?s)by their names alone.*several image_000, image_002"):
        detect(student(), source, detector, PHRASES, tmp_path / "found", annotations=truth)


@pytest.mark.parametrize("change", [{"images": []}, {"annotations": []}, {"categories": None}, None])
def test_annotations_without_images_are_refused(coco: Path, tmp_path: Path, change: dict | None) -> None:
    content = json.loads(coco.read_text())
    (tmp_path / "changed.json").write_text(json.dumps([] if change is None else content | change))
    with pytest.raises(RecipeError, match=r"(?s)does not hold COCO's annotations.*instances_val2017"):
        CocoAnnotations(tmp_path / "changed.json")


def test_sizes_of_which_nothing_is_annotated_have_no_precision(
    folder: Path, images: Path, coco: Path, tmp_path: Path
) -> None:
    student().save_pretrained(tmp_path / "student")
    words = ["zeroshot", "detect", str(tmp_path / "student"), str(images), "--detector", str(folder)]
    words += ["--annotations", str(coco), "-o", str(tmp_path / "found")]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "400"})
    assert done.exit_code == 0, done.output
    assert "2 images, 12 boxes, 1 annotated images that are not there; AP " in done.output
    assert "APs " in done.output
    assert "APl" not in done.output


def test_a_detector_with_other_weights_is_refused(folder: Path, images: Path, tmp_path: Path) -> None:
    one = {"model": TINY, "checkpoint": str(folder), "codec": "f32"}
    teachers = {name: one | {"block_indices": [n]} for n, name in enumerate(("fine", "coarse"))}
    views = {"num_views": 1, "size": [64, 64]}
    cache = build(build_recipe(tmp_path / "cache", images, teachers=teachers, views=views)).cache
    place = str(cache.storage.url)
    _require_weights(place, list(teachers), str(folder))
    state = load_file(folder / "model.safetensors")
    state["model.input_proj_vision.1.0.weight"] += 1
    save_file(state, tmp_path / "other.safetensors", {"format": "pt"})
    with pytest.raises(CacheMismatchError, match=f"not the weights of {TINY}"):
        _require_weights(place, list(teachers), str(tmp_path / "other.safetensors"))


def test_the_command_draws_boxes_and_writes_them(folder: Path, images: Path, tmp_path: Path) -> None:
    student().save_pretrained(tmp_path / "student")
    licences = ", ".join(f"{name}: random weights" for name in MAPS)
    (tmp_path / "student/README.md").write_text(f"---\nteacher_licences: {{{licences}}}\n---\n")
    words = ["zeroshot", "detect", str(tmp_path / "student"), str(images), "--detector", str(folder)]
    words += ["--prompt", "Red cats. dog.", "--threshold", "0", "-o", str(tmp_path / "found")]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "400"})
    assert done.exit_code == 0, done.output
    assert "student (random weights): 3 images, 18 boxes" in done.output
    content = json.loads((tmp_path / "found/detections.json").read_text())
    assert len(content["images"]) == 3
    assert len(content["annotations"]) == 3 * 6
    drawn = Image.open(tmp_path / "found/image_000.png")
    original = Image.open(images / "image_000.jpg")
    assert drawn.size == original.size
    assert (np.asarray(drawn) != np.asarray(original)).any()
