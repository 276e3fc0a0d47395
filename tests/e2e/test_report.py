"""`teachercache report`: one page that stands alone, whatever the cache holds."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from teachercache.jobs.cli import app
from teachercache.jobs.inspection.charts import channel_curve, error_curve, norm_histogram
from teachercache.jobs.inspection.explorer import Comparisons
from teachercache.jobs.inspection.feature_facts import cosine_error, level_facts, linear_cka
from teachercache.jobs.inspection.report import write_report
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import CodecError
from teachercache.pipeline.exploring.feature_pictures import PcaBasis
from teachercache.pipeline.exploring.map_reader import MapReader
from tests.browser import Browser
from tests.make_cache import commit_shard, make_cache, make_images, teacher_spec

HOSTILE = "<img src=x onerror=alert(1)>"


class Links(HTMLParser):
    """Collects everything that a browser could fetch, and what it could run."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.pictures = 0
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object", "embed", "form")
        assert not [name for name, _ in attributes if name.startswith("on")]
        self.pictures += tag == "img"
        self.fetched += [
            value or "" for name, value in attributes if name in ("src", "srcset", "data", "action")
        ]
        self.fetched += [value or "" for name, value in attributes if name == "href" and tag != "use"]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_images(tmp_path_factory.mktemp("images"), 6)
    (folder / "image_005.jpg").rename(folder / f"{HOSTILE}.jpg")
    return folder


def test_the_page_stands_alone(tmp_path: Path, images: Path) -> None:
    make_cache(tmp_path / "cache", images)
    page = tmp_path / "report.html"
    result = CliRunner().invoke(app, ["report", str(tmp_path / "cache"), "-o", str(page), "--samples", "6"])
    assert result.exit_code == 0, result.output
    html = page.read_text()
    links = Links(html)
    assert links.fetched
    assert all(link.startswith(("data:image/", "#section")) for link in links.fetched)
    assert all(html.count(f'id="{link[1:]}"') == 1 for link in links.fetched if link.startswith("#"))
    assert "`" not in links.text
    assert not re.search(r"url\((?!#)|@import", html)
    assert len(html) < 8e6
    assert links.pictures > 6 * (1 + 2 * 2 * 4)
    before_the_contents = links.text[: links.text.index("What it is")]
    assert "Random weights, for tests and timing only: alpha, beta." in before_the_contents
    for words in (
        *("What it is", "What the teachers see", "How it was built", "How alike the teachers are"),
        *("Channels and norms of alpha", "Codecs on beta", "int4-hadamard", "Random weights", "level 4"),
    ):
        assert words in links.text
    assert HOSTILE in links.text


def test_equal_caches_give_equal_pages(tmp_path: Path, images: Path) -> None:
    cache = make_cache(tmp_path / "cache", images)
    assert write_report(cache, num_samples=2, seed=3) == write_report(cache, num_samples=2, seed=3)
    assert write_report(cache, num_samples=2, seed=3) != write_report(cache, num_samples=2, seed=4)


def test_a_half_built_cache(tmp_path: Path, images: Path) -> None:
    text = Links(write_report(make_cache(tmp_path / "cache", images, skip_shards=[1]))).text
    assert "Not complete" in text
    assert "row 0" in text
    assert "row 6" not in text
    empty = make_cache(tmp_path / "empty", images, skip_shards=[0, 1])
    assert "no shard is committed yet" in Links(write_report(empty)).text


def test_a_broken_cache(tmp_path: Path, images: Path) -> None:
    cache = make_cache(tmp_path / "cache", images, invalid_samples=[4])
    shard = tmp_path / "cache/teachers/alpha/codes/c/1/0/0/0/0"
    shard.write_bytes(b"x")
    text = Links(write_report(FeatureCache.open(cache.storage.url))).text
    assert text.count("c/1/0/0/0/0 has 1 bytes") > 1, "where the map would be, too"
    assert "Channels and norms of alpha" in text
    (tmp_path / "cache/commits/beta/00001.json").write_text("{")
    text = Links(write_report(FeatureCache.open(cache.storage.url))).text
    assert "00001.json of this cache was damaged" in text
    assert "row 0" in text
    assert "row 6" not in text
    (tmp_path / "cache/commits/beta/00000.json").write_text("{")
    text = Links(write_report(FeatureCache.open(cache.storage.url))).text
    assert "beta is not shown below" in text
    assert "row 0" in text


def test_images_that_moved(tmp_path: Path, images: Path) -> None:
    cache = make_cache(tmp_path / "cache", images)
    here = images.rename(images.with_name("moved"))
    assert "the image cannot be had" in write_report(FeatureCache.open(cache.storage.url))
    result = CliRunner().invoke(
        app,
        ["report", cache.storage.url, "-o", str(tmp_path / "page.html"), "--images", str(here)],
    )
    here.rename(images)
    assert result.exit_code == 0, result.output
    assert "the image cannot be had" not in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("codec", ["f32", "bf16"])
def test_one_sample_of_one_tiny_teacher(tmp_path: Path, images: Path, codec: str) -> None:
    teachers = {"only $name": teacher_spec(width=4, grid=1, codec=codec)}
    cache = make_cache(tmp_path / "cache", images, teachers=teachers)
    assert "There are too few tokens" in write_report(cache, num_samples=1)


@pytest.mark.parametrize("value", [1e5, 1e30, float("inf"), float("-inf"), float("nan")])
def test_a_value_that_other_codecs_cannot_hold(tmp_path: Path, images: Path, value: float) -> None:
    spec = teacher_spec(codec="bf16")
    cache = make_cache(tmp_path / "cache", images, teachers={"alpha": spec}, skip_shards=[0, 1])
    for shard in range(2):
        commit_shard(cache, "alpha", shard, value=value)
    text = Links(write_report(FeatureCache.open(cache.storage.url))).text
    refused = "f16" in re.findall(r"(f16|int\d-\w+)[–]+Codec \S+ cannot hold", text)
    assert refused == (abs(value) in (1e5, 1e30))
    assert "int4-dct" in text


def test_a_dct_is_learnt_from_enough_rows_or_not_at_all(tmp_path: Path, images: Path) -> None:
    cache = make_cache(tmp_path / "cache", images, teachers={"alpha": teacher_spec(grid=4)})
    assert "int4-dct cannot be learnt from 2 rows" in Links(write_report(cache, num_samples=3)).text
    assert "cannot be learnt" not in Links(write_report(cache, num_samples=6)).text
    few = Comparisons(cache)
    few.reader.rows = few.reader.rows[:3]
    with pytest.raises(CodecError, match="cannot be learnt from 2 rows"):
        few.codec_error("alpha", few.reader.rows[0], 0, "int4-dct")
    assert Comparisons(cache).codec_error("alpha", few.reader.rows[0], 0, "int4-dct").note


def test_the_legend_hides_no_line() -> None:
    """Its names stand to the right of the axes."""
    svg = error_curve({"f16": np.array([1e-7, 1e-6]), "int3-hadamard": np.array([1e-3, 1e-2])})
    corners = re.findall(r"[ML] ([\d.]+) ", svg[svg.index('"patch_2"') :].split("z")[0])
    names = re.findall(r'x="([\d.]+)"[^>]*>(f16|int3-hadamard)<', svg)
    assert [name for _, name in names] == ["f16", "int3-hadamard"]
    assert min(float(x) for x, _ in names) > max(map(float, corners)) > 200


def test_every_level_has_a_line_of_its_own() -> None:
    values = {f"level {n}": np.linspace(1, 2 + n, 30) for n in range(1, 25)}
    for draw in (norm_histogram, channel_curve, error_curve):
        svg = draw(values)
        legend = svg[svg.index('id="legend_1"') :]
        styles = set(re.findall(r'style="(fill: none; [^"]*stroke: #\w+)', legend))
        assert len(styles) == 24
        assert all(style in svg[: svg.index('id="legend_1"')] for style in styles)
        assert all(f">{name}<" in legend for name in values)
        assert max(float(y) for y in re.findall(r'<text[^>]* y="([\d.]+)"', legend)) < 2.9 * 72


def test_numbers_on_a_logarithmic_axis_have_room() -> None:
    svg = error_curve({"int3-hadamard of a long name": np.geomspace(1e-11, 1e-1, 50)})
    axis = svg[svg.index('"matplotlib.axis_1"') : svg.index('"matplotlib.axis_2"')]
    places = [float(x) for x in re.findall(r'<text[^>]* x="([\d.]+)"[^>]*>[\d.⁻⁰¹²³⁴-⁹]+</text>', axis)]
    assert len(places) >= 3
    assert min(np.diff(places)) > 26
    assert "10⁻" in axis


def test_one_channel_is_a_point() -> None:
    points = [channel_curve({"level 1": np.full(n, 2.0)}).count('style="fill: #0072b2') for n in (1, 2)]
    assert points[0] > points[1] == 0


def test_channels_that_are_dead_loud_or_broken() -> None:
    maps_SHWC = torch.randn(2, 6, 6, 16, generator=torch.Generator().manual_seed(0))
    maps_SHWC[0, ..., 3] = 7
    maps_SHWC[1, ..., 5] *= 30
    maps_SHWC[1, 2, 2, 9] = float("nan")
    first, second = level_facts([maps_SHWC, maps_SHWC])
    assert (first.dead, first.not_finite) == ([3], [])
    assert (second.dead, second.not_finite) == ([], [9])
    assert second.loud == [5]
    assert second.std_C[5] == pytest.approx(maps_SHWC[1, ..., 5].std(correction=0).item(), rel=1e-4)
    assert second.share_C[5] > 0.9
    norms_N = torch.linalg.vector_norm(maps_SHWC[0], dim=-1).flatten()
    torch.testing.assert_close(first.norms_N, norms_N.repeat(2))


def test_values_that_are_not_finite_do_not_decide_the_colours() -> None:
    tokens_NC = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    clean = PcaBasis.fit(tokens_NC)
    tokens_NC[5, 2], tokens_NC[7, 3], tokens_NC[9, 4] = float("inf"), float("-inf"), float("nan")
    basis = PcaBasis.fit(tokens_NC)
    picture_HW3 = basis.picture(tokens_NC.view(10, 20, 8))
    assert len(np.unique(picture_HW3)) > 100
    torch.testing.assert_close(basis.std_C, clean.std_C, rtol=0.1, atol=0)


def test_colours_keep_their_sign_from_level_to_level(tmp_path: Path, images: Path) -> None:
    """Levels of the same three signals, each mixed into the channels in its own way."""
    reader = MapReader(make_cache(tmp_path / "cache", images, teachers={"alpha": teacher_spec(grid=4)}))
    generator = torch.Generator().manual_seed(0)
    signals_N3 = torch.randn(96, 3, generator=generator) * torch.tensor([9.0, 3.0, 1.0])
    mixes = [torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q[:3] for _ in range(4)]
    levels_SNC = torch.stack([signals_N3 @ mix_3C for mix_3C in mixes])
    levels_SNC += 0.01 * torch.randn(levels_SNC.shape, generator=generator)
    reader.tokens = lambda _: levels_SNC
    projected_SN3 = torch.stack([reader.basis("alpha", s).project(levels_SNC[s]) for s in range(4)])
    assert ((projected_SN3[1:] * projected_SN3[:-1]).sum(1) > 0).all()


def test_cka_is_the_unbiased_one() -> None:
    """Against the estimator as Song et al. 2012 write it (Eq. 5)."""
    generator = torch.Generator().manual_seed(0)
    x_NC = torch.randn(40, 30, generator=generator, dtype=torch.float64)
    y_NC = torch.cat([x_NC[:, :10], torch.randn(40, 12, generator=generator, dtype=torch.float64)], 1)

    def hsic(k_NN: torch.Tensor, l_NN: torch.Tensor) -> torch.Tensor:
        n, ones = len(k_NN), torch.ones(len(k_NN), dtype=torch.float64)
        k_NN, l_NN = k_NN.clone().fill_diagonal_(0), l_NN.clone().fill_diagonal_(0)
        sums = (ones @ k_NN @ ones) * (ones @ l_NN @ ones) / ((n - 1) * (n - 2))
        cross = ones @ k_NN @ l_NN @ ones
        return (torch.trace(k_NN @ l_NN) + sums - 2 / (n - 2) * cross) / (n * (n - 3))

    k_NN, l_NN = x_NC @ x_NC.T, y_NC @ y_NC.T
    expected = hsic(k_NN, l_NN) / (hsic(k_NN, k_NN) * hsic(l_NN, l_NN)).sqrt()
    rotation_CC = torch.linalg.qr(torch.randn(30, 30, generator=generator, dtype=torch.float64)).Q
    cka_KK = linear_cka([x_NC, y_NC, 5 * x_NC @ rotation_CC])
    assert cka_KK[0, 1].item() == pytest.approx(expected.item(), abs=1e-5)
    assert cka_KK[0, 2].item() == pytest.approx(1, abs=1e-5)


def test_small_errors_do_not_cancel() -> None:
    token_C = torch.randn(64, generator=torch.Generator().manual_seed(0)).double()
    other_C = token_C + 1e-4 * torch.randn(64, generator=torch.Generator().manual_seed(1)).double()
    exact = 1 - torch.nn.functional.cosine_similarity(token_C, other_C, dim=0)
    found = cosine_error(token_C.float()[None], other_C.float()[None])
    np.testing.assert_allclose(found.item(), exact.item(), rtol=1e-2)


@pytest.mark.parametrize("num_levels", [1, 12])
def test_many_levels_fit_a_laptop(tmp_path: Path, images: Path, browser: Browser, num_levels: int) -> None:
    """And so do teachers of long names and of one channel."""
    spec = teacher_spec(grid=4).model_copy(update={"block_indices": tuple(range(1, 1 + num_levels))})
    teachers = {"vit_of_a_long_name_" * 5: spec, "narrow": teacher_spec(width=1, grid=3)}
    page_file = tmp_path / "report.html"
    cache = make_cache(tmp_path / "cache", images, teachers=teachers)
    page_file.write_text(write_report(cache, num_samples=4))
    most = max(num_levels, 4)
    with browser.page() as page:
        page.goto(page_file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
        edges = page.locator(".maps img").evaluate_all("all => all.map(i => i.getBoundingClientRect().right)")
        assert max(edges) < page.viewport_size["width"]
        assert f"norm, {most}\n" in page.locator(".sample").first.inner_text() + "\n"
        assert "Levels 1 to 4 are blocks 0, 1, 2, 3 of narrow." in page.inner_text("body")
        svgs = page.locator("svg").evaluate_all(
            """all => all.map(svg => {
                const box = svg.getBoundingClientRect();
                return [...svg.querySelectorAll("text")].every(text => {
                    const one = text.getBoundingClientRect();
                    return one.left >= box.left - 1 && one.right <= box.right + 1;
                });
            })"""
        )
        assert svgs
        assert all(svgs)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it(tmp_path: Path, images: Path, browser: Browser, scheme: str) -> None:
    page_file = tmp_path / "report.html"
    page_file.write_text(write_report(make_cache(tmp_path / "cache", images), num_samples=3))
    with browser.page(scheme) as page:
        page.goto(page_file.as_uri())
        assert page.locator("img").evaluate_all("images => images.every(i => i.complete && i.naturalWidth)")
        assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    assert browser.requests == [page_file.as_uri()]
