"""The report: one page that shows a cache, and asks for nothing from outside."""

from __future__ import annotations

import re

import pytest
from rich.console import Console

from cache_builder import build
from jobs.inspection.report import write_report
from tests.make_cache import build_recipe, make_images


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    images = make_images(folder / "images", 5)
    (images / "image_001.jpg").write_bytes(b"<html>not an image</html>")
    cache = build(build_recipe(folder / "cache", images), Console(quiet=True)).cache
    return write_report(cache, num_samples=3, seed=0, progress=lambda _: None)


def test_it_says_what_is_there_and_what_is_wrong(html: str) -> None:
    for text in ("vit_tiny_patch16_224", "random (seed 0)", "image_001", "not an image"):
        assert text in html
    assert len(set(re.findall(r"image_00\d", html))) == 4, "the quarantined one and three that are shown"
    assert html.count("data:image/") >= 3 * (1 + 2 * 4), "an image, four PCA maps and four norm maps a sample"


def test_nothing_comes_from_outside(html: str) -> None:
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']+""", html)
    assert not re.findall(r"url\((?!['\"]?(?:data:|#))", html)
    assert "@import" not in html
    assert len(html) < 8_000_000
