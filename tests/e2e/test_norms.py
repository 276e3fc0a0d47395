"""`teachercache norms`: the figure of what two images change in tokens (SAK, Figure 6)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from teachercache import build_student
from teachercache.jobs.cli import app
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import RecipeError, UnknownKeyError
from teachercache.pipeline.exploring.feature_pictures import heat, range_words, token_norms
from teachercache.student.measuring.figures import norm_figure
from tests.make_cache import make_cache, make_images

KEYS = "image_000", "image_002"
TEACHERS = {"alpha": 8, "beta": 4}  # as in make_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    root = tmp_path_factory.mktemp("cache")
    return make_cache(root / "cache", make_images(root / "images", 3))


def test_teachers_and_paths_stand_beside_each_other(cache: FeatureCache, tmp_path: Path) -> None:
    student = build_student("sak", stem="test_vit", teacher_dims=TEACHERS, image_size=(32, 32))
    student.save_pretrained(tmp_path / "student")
    arguments = ["norms", cache.storage.url, *KEYS, "--student", str(tmp_path / "student")]
    found = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "norms.png")])
    assert found.exit_code == 0, found.output
    with Image.open(tmp_path / "norms.png") as image:
        assert image.width > image.height > 300

    titles = [axes.get_title() for axes in norm_figure(cache, KEYS, student).axes[:6]]
    names = [" ".join(title.splitlines()[:2]).strip() for title in titles]
    assert names == [
        "view", "alpha teacher", "alpha student", "beta teacher", "beta student", "student's stem",
    ]  # fmt: skip


def test_a_range_is_two_numbers_or_said_to_be_none() -> None:
    assert range_words(0.5217, 12.34) == "0.522 … 12.3"
    assert range_words(19.6001, 19.6004) == "19.6001 … 19.6004"
    assert range_words(0.0, 0.0) == "constant 0"


@pytest.mark.parametrize("level", [-1, 0])
def test_maps_are_norms_and_norms_of_differences(cache: FeatureCache, level: int) -> None:
    figure = norm_figure(cache, KEYS, level=level)
    shown = [np.asarray(figure.axes[line * 3 + 1].images[0].get_array()) for line in range(3)]
    maps_2HWC = [cache[key].features("alpha")[level] for key in KEYS]
    norms_2HW = [token_norms(map_HWC) for map_HWC in maps_2HWC]
    low = min(float(norms_HW.min()) for norms_HW in norms_2HW)
    high = max(float(norms_HW.max()) for norms_HW in norms_2HW)
    difference_HW = (maps_2HWC[0] - maps_2HWC[1]).square().sum(-1).sqrt()
    expected = [heat(norms_HW, low, high) for norms_HW in norms_2HW]
    expected.append(heat(difference_HW, 0, float(difference_HW.max())))
    assert all(np.abs(a.astype(int) - b.astype(int)).max() <= 2 for a, b in zip(shown, expected, strict=True))
    assert f"level {4 if level else 1}" in figure.get_suptitle()


def test_what_cannot_be_drawn_is_refused(cache: FeatureCache) -> None:
    with pytest.raises(UnknownKeyError, match="No sample has this key"):
        norm_figure(cache, ("image_000", "image_9"))
    with pytest.raises(RecipeError, match="no such level"):
        norm_figure(cache, KEYS, level=4)
    other = build_student("sak", stem="test_vit", teacher_dims=TEACHERS, image_size=(48, 48))
    with pytest.raises(RecipeError, match="does not see the views"):
        norm_figure(cache, KEYS, other)
