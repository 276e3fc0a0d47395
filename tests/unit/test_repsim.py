"""Representation similarity against a loop over tokens, and where it must be 1."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from teachercache.jobs.cli import app
from teachercache.jobs.inspection.tables import similarity_table
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import CacheError, RecipeError
from teachercache.pipeline.grids import upsample
from teachercache.pipeline.records.spec import GridSpec
from teachercache.pipeline.views import render_view
from teachercache.student.build import build_student
from teachercache.student.models.student import Student
from teachercache.student.sak.model import SAK
from teachercache.student.similarity import Similarity, representation_similarity, token_cosines
from tests.make_cache import make_cache, make_images, teacher_spec


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    root = tmp_path_factory.mktemp("cache")
    return make_cache(root / "cache", make_images(root / "images", 7), num_views=1, invalid_samples=[2])


@pytest.fixture(scope="module")
def student() -> Student:
    torch.manual_seed(0)
    return build_student("sak", stem="test_vit", teacher_dims={"alpha": 8, "beta": 4}, image_size=(32, 32))


def by_hand(student: Student, cache: FeatureCache, teacher: str, samples: list[int]) -> list[float]:
    sums = np.zeros(4)
    for sample in samples:
        row = int(cache.index.rows(sample, 0))
        image = render_view(cache.image(sample), cache.view(row), (32, 32))
        with torch.no_grad():
            maps = student.eval()(student.normalize(image[None]))[teacher]
        target = cache.read([row], [teacher])[teacher].decode()[0]
        for level in range(4):
            height, width = target.shape[1:3]
            student_CHW = upsample(maps[level], (height, width))[0]
            cosines = [
                torch.dot(student_CHW[:, i, j], target[level, i, j])
                / (student_CHW[:, i, j].norm() * target[level, i, j].norm())
                for i in range(height)
                for j in range(width)
            ]
            sums[level] += float(torch.stack(cosines).mean())
    return [float(total) / len(samples) for total in sums]


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_is_the_mean_over_tokens_and_samples(cache: FeatureCache, student: Student, batch_size: int) -> None:
    student.train()
    similarity = representation_similarity(student, cache, batch_size=batch_size)
    assert student.training
    for teacher in ("alpha", "beta"):
        expected = by_hand(student, cache, teacher, [0, 1, 3, 4, 5, 6])
        assert similarity[teacher].levels == pytest.approx(expected, abs=1e-5)
        assert similarity[teacher].mean == pytest.approx(sum(expected) / 4, abs=1e-5)


def test_takes_no_more_samples_than_asked(cache: FeatureCache, student: Student) -> None:
    few = representation_similarity(student, cache, ["alpha"], max_samples=1, batch_size=4)["alpha"]
    alone = [by_hand(student, cache, "alpha", [sample]) for sample in (0, 1, 3, 4, 5, 6)]
    assert any(few.levels == pytest.approx(levels, abs=1e-5) for levels in alone)


def test_teachers_are_those_that_both_have(cache: FeatureCache, student: Student) -> None:
    dims = {"alpha": 8, "gamma": 8}
    other = build_student("sak", stem="test_vit", teacher_dims=dims, image_size=(32, 32))
    assert representation_similarity(other, cache).keys() == {"alpha"}
    stranger = build_student("sak", stem="test_vit", teacher_dims={"gamma": 8}, image_size=(32, 32))
    with pytest.raises(RecipeError, match="none in common"):
        representation_similarity(stranger, cache)


def test_the_bare_stem_is_a_row_of_its_own(tmp_path: Path, student: Student) -> None:
    """SAK, Table 17, row 1: what the stem gives before any path, against a teacher of its width."""
    specs = {"alpha": teacher_spec(width=64), "beta": teacher_spec(width=4)}
    images = make_images(tmp_path / "images", 3)
    cache = make_cache(tmp_path / "cache", images, teachers=specs, num_views=1)
    dims = {"alpha": 64, "beta": 4}
    sak = build_student("sak", stem="test_vit", teacher_dims=dims, image_size=(32, 32))
    assert isinstance(sak, SAK)
    sak.save_pretrained(tmp_path / "student")
    told = CliRunner().invoke(
        app,
        [
            "repsim",
            str(tmp_path / "student"),
            str(tmp_path / "cache"),
            "--stem",
            "--teachers",
            "alpha",
            "--json",
        ],
    )
    assert told.exit_code == 0, told.output
    found = json.loads(told.output)
    assert list(found) == ["alpha", "stem, alpha"]
    pixels = torch.stack([render_view(cache.image(i), cache.view(i), (32, 32)) for i in range(3)])
    with torch.no_grad():
        levels = sak.eval().representations(sak.normalize(pixels))[0]
    maps = [tokens.transpose(1, 2).unflatten(2, (2, 2)) for tokens in levels]
    expected = token_cosines(maps, cache.read(np.arange(3), ["alpha"])["alpha"].decode()).mean(0)
    assert found["stem, alpha"]["levels"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert found["alpha"]["levels"] != pytest.approx(expected.tolist(), abs=1e-3)
    with pytest.raises(RecipeError, match="a stem of 64 channels"):
        representation_similarity(sak, cache, ["beta"], stem=True)


def test_is_one_for_a_teacher_that_is_its_own_student() -> None:
    target_BSHWC = torch.randn(2, 4, 3, 5, 6)
    maps = [7 * target_BSHWC[:, level].permute(0, 3, 1, 2) for level in range(4)]
    torch.testing.assert_close(token_cosines(maps, target_BSHWC), torch.ones(2, 4))


def test_what_cannot_be_compared_says_why(cache: FeatureCache, student: Student) -> None:
    with pytest.raises(CacheError, match="did you mean beta"):
        representation_similarity(student, cache, ["betta"])
    stem = "test_vit"
    wide = build_student("sak", stem=stem, teacher_dims={"alpha": 8}, image_size=(32, 48))
    with pytest.raises(RecipeError, match="views of"):
        representation_similarity(wide, cache)
    alone = build_student("sak", stem=stem, teacher_dims={"alpha": 8}, image_size=(32, 32))
    with pytest.raises(RecipeError, match="not distilled from"):
        representation_similarity(alone, cache, ["alpha", "beta"])


def test_a_teacher_of_fewer_levels_stands_beside_the_last() -> None:
    found = {"many": Similarity((0.1, 0.2, 0.3, 0.4)), "one": Similarity((0.9,))}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(similarity_table(found))
    lines = console.export_text().splitlines()
    assert [line.split() for line in lines if "level" in line] == [
        ["level", "1", "0.1000"],
        ["level", "2", "0.2000"],
        ["level", "3", "0.3000"],
        ["level", "4", "0.4000", "0.9000"],
    ]


def test_of_an_adjoint_it_is_that_of_what_the_grid_can_reach(student: Student, tmp_path: Path) -> None:
    grid = GridSpec(kind="adjoint", size=(2, 2))
    spec = teacher_spec(grid=5).model_copy(update={"grid": grid})
    images = make_images(tmp_path / "images", 3)
    cache = make_cache(tmp_path / "cache", images, teachers={"alpha": spec}, num_views=1)
    found = representation_similarity(student, cache, ["alpha"], batch_size=3)["alpha"]
    rows = np.arange(3)
    pixels = torch.stack(
        [render_view(cache.image(sample), cache.view(sample), (32, 32)) for sample in range(3)]
    )
    with torch.no_grad():
        maps = student.eval()(student.normalize(pixels))["alpha"]
    expected = token_cosines(maps, cache.feature_maps("alpha", rows)).mean(0)
    assert found.levels == pytest.approx(expected.tolist(), abs=1e-5)
