"""`teachercache probe` on classes that a colour tells apart: a student on images, teachers from caches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from teachercache import build
from teachercache.jobs.cli import app
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import CacheMismatchError, RecipeError
from teachercache.pipeline.grids import mean_token, nearest
from teachercache.pipeline.rearranging.subset import subset
from teachercache.pipeline.records.spec import GridSpec
from teachercache.pipeline.records.view_policy import ViewPolicy
from teachercache.pipeline.sources import open_source
from teachercache.pipeline.views import draw_view, render_view
from teachercache.student.build import build_student, load_student
from teachercache.student.measuring.image_features import (
    CachedTeacherFeatures,
    StudentFeatures,
    require_same_teacher,
)
from teachercache.student.sak.model import SAK
from tests.make_cache import build_recipe, make_images, teacher_spec

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
COLOURS = {"n01": (220, 40, 40), "n02": (40, 200, 60), "n03": (50, 60, 220)}


def write_classes(folder: Path, per_class: int, seed: int) -> Path:
    """A folder for each class: its colour, under noise."""
    generator = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = np.array(colour) + generator.integers(-30, 30, (36, 48, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{seed}_{number}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_classes(root / "train", 9, seed=0)
    write_classes(root / "val", 4, seed=1)
    return root


@pytest.fixture(scope="module")
def caches(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("caches")
    teacher = {"model": "vit_tiny_patch16_224", "pretrained": False, "codec": "f32", "cls_token": True}
    views = {"policy": "imagenet_eval", "size": [32, 32]}
    for split in ("train", "val"):
        recipe = build_recipe(root / split, images / split, teachers={"tiny": teacher}, views=views)
        build(recipe, Console(quiet=True))
    return root


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    torch.manual_seed(0)
    dims = {"one": 64, "two": 48}
    build_student("sak", stem="test_vit", teacher_dims=dims, image_size=(32, 32)).save_pretrained(folder)
    return folder


def test_a_teacher_is_probed_from_its_cache(caches: Path) -> None:
    found = CliRunner().invoke(app, ["probe", str(caches / "train"), str(caches / "val"), "--json"])
    assert found.exit_code == 0, found.output
    (probe,) = json.loads(found.stdout)
    assert (probe["train_images"], probe["test_images"], probe["classes"]) == (27, 12, 3)
    assert probe["name"] == "tiny (random weights)"
    assert probe["features"] == 2 * 192
    assert probe["top1"] == 100


def test_a_student_is_probed_on_images(images: Path, student: Path) -> None:
    arguments = ["probe", str(images / "train"), str(images / "val"), "--student", str(student)]
    found = CliRunner().invoke(app, [*arguments, "--size", "48", "--json"])
    assert found.exit_code == 0, found.output
    (probe,) = json.loads(found.stdout)
    assert (probe["train_images"], probe["test_images"], probe["top1"]) == (27, 12, 100)
    table = CliRunner().invoke(app, arguments)
    assert "top-1" in table.output


def test_features_of_a_student_are_the_means_of_its_experts(images: Path, student: Path) -> None:
    loaded, source = load_student(student), open_source(images / "train")
    assert isinstance(loaded, SAK)
    features = StudentFeatures(loaded, source, batch_size=4)
    found_2F = features.read([20, 3])
    sample = source.scan().to_pylist()[3]
    with Image.open(images / "train" / sample["path"]) as image:
        view = draw_view(ViewPolicy(policy="imagenet_eval", size=(32, 32)), "", *image.size, 0)
        pixels_13HW = loaded.normalize(render_view(image, view)[None])
    with torch.no_grad():
        experts = loaded.representations(pixels_13HW)
        class_token = loaded.stem(pixels_13HW)[-1][0, 0]
    expected = torch.cat([class_token, *(levels[-1][0].mean(0) for levels in experts)])
    assert len(expected) == features.width
    assert torch.allclose(found_2F[1], expected, atol=1e-5)
    assert not torch.allclose(found_2F[0], expected, atol=1e-2)
    assert features.labels[3] == "n01"


def test_features_of_a_cache_are_its_last_level(caches: Path) -> None:
    cache = FeatureCache.open(caches / "train")
    found_2F = CachedTeacherFeatures(cache, "tiny", batch_size=1).read([5, 11])
    rows = cache.index.rows(np.array([5, 11]), 0)
    cls = cache.read_tokens(rows, "tiny", "cls")[:, -1]
    mean = cache.read(rows, ["tiny"])["tiny"].decode()[:, -1].mean((1, 2))
    assert torch.allclose(found_2F, torch.cat([cls, mean], 1))
    assert torch.equal(CachedTeacherFeatures(cache, "tiny", "cls").read([5, 11]), cls)
    assert torch.equal(CachedTeacherFeatures(cache, "tiny", "mean").read([5, 11]), mean)


def test_an_adjoint_keeps_the_mean_token() -> None:
    generator = torch.Generator().manual_seed(0)
    native_BCHW = torch.randn(2, 6, 9, 7, generator=generator, dtype=torch.float64)
    kept_BNC = nearest(native_BCHW, (3, 4)).flatten(2).transpose(1, 2)
    spec = teacher_spec().model_copy(
        update={"native_grid": (9, 7), "grid": GridSpec(kind="adjoint", size=(3, 4))}
    )
    assert torch.allclose(mean_token(kept_BNC, spec), native_BCHW.mean((2, 3)))


def test_what_cannot_be_probed_is_refused(caches: Path, images: Path, student: Path, tmp_path: Path) -> None:
    amalgam = build_student(
        "amalgam", stem=None, teacher_dims={"one": 8}, image_size=(32, 32), tasks={"x": 2}, fusion="sum"
    )
    with pytest.raises(RecipeError, match="no features of its own"):
        StudentFeatures(amalgam, open_source(images / "train"))
    one = CachedTeacherFeatures(FeatureCache.open(caches / "train"), "tiny")
    other = CachedTeacherFeatures(FeatureCache.open(caches / "val"), "tiny")
    require_same_teacher(one, other)
    other.spec = other.spec.model_copy(update={"weights_hash": "0" * 32})
    with pytest.raises(CacheMismatchError, match="weights_hash"):
        require_same_teacher(one, other)
    flat = make_images(tmp_path / "flat", 3)
    other_flat = make_images(tmp_path / "other_flat", 2, seed=1)
    found = CliRunner().invoke(app, ["probe", str(flat), str(other_flat), "--student", str(student)])
    assert isinstance(found.exception, RecipeError)
    assert "3 of 3" in str(found.exception)


def test_images_are_not_tested_on_that_were_trained_on(
    caches: Path, images: Path, student: Path, tmp_path: Path
) -> None:
    """Whatever they are called, and wherever they lie: by content."""
    renamed = shutil.copytree(images / "train", tmp_path / "renamed")
    for path in sorted(renamed.rglob("*.png")):
        path.rename(path.with_name(f"other_{path.name}"))
    subset(str(caches / "train"), str(tmp_path / "part"), fraction=0.5).run()
    for arguments in (
        [str(caches / "train"), str(caches / "train")],
        [str(caches / "train"), str(tmp_path / "part")],
        [str(images / "train"), str(renamed), "--student", str(student)],
    ):
        found = CliRunner().invoke(app, ["probe", *arguments])
        assert isinstance(found.exception, RecipeError), found.output
        assert "all of them among the 27 training images" in str(found.exception)


def test_two_processes_find_what_one_finds(caches: Path, tmp_path: Path) -> None:
    arguments = ["probe", str(caches / "train"), str(caches / "val"), "--json"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, "-m", "teachercache.jobs.cli", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (two,) = json.loads(done.stdout)
    (one,) = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    assert two == one
