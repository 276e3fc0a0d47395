"""Builds with calibrated codecs and the adjoint grid, and the budget that chooses them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from rich.console import Console

from teachercache import FeatureCache, build, build_teacher, render_view
from teachercache.cache_builder.budget import Option, candidates, choose, measure
from teachercache.cache_builder.build_recipe import BuildRecipe
from teachercache.cache_builder.builder import prepare
from teachercache.cache_builder.compute import Computed, _tokens
from teachercache.cache_builder.plan import Plan
from teachercache.cache_builder.teachers import TeacherRecipe, resolve_teacher
from teachercache.cache_builder.teachers.teacher import TeacherFeatures
from teachercache.pipeline.codecs import codec_names, get_codec
from teachercache.pipeline.codecs.fidelity import measure_fidelity
from teachercache.pipeline.errors import (
    CacheError,
    CacheMismatchError,
    CodecError,
    DiskSpaceError,
    RecipeError,
)
from teachercache.pipeline.grids import stored_form
from teachercache.pipeline.rearranging.merge import merge
from teachercache.pipeline.records.feature_stats import FeatureMoments
from teachercache.pipeline.units import parse_bytes
from teachercache.pipeline.verify import verify
from tests.make_cache import build_recipe, make_cache, make_images

QUIET = Console(quiet=True)
TEACHER = {"model": "vit_tiny_patch16_224", "pretrained": False, "image_size": 96}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 8)


def test_a_calibrated_codec_is_what_its_fidelity_says(tmp_path: Path, images: Path) -> None:
    cache = build(
        build_recipe(tmp_path / "cache", images, teachers={"t": TEACHER | {"codec": "int8-hadamard"}}), QUIET
    ).cache
    spec = cache.spec.teachers["t"]
    assert (tmp_path / "cache" / "stats" / "t.safetensors").exists()
    assert cache.spec.fidelity["t"]["cosine_mean"] > 0.999
    live = build_teacher(spec)(render_view(cache.image(2), cache.view(5), spec.render_size)[None])
    decoded = cache.read([5])["t"].decode()
    error = (decoded - live.feature_maps_BSHWC).norm() / live.feature_maps_BSHWC.norm()
    assert error < 2 * cache.spec.fidelity["t"]["raw_relative_l2"] + 1e-6
    assert cache.read([5])["t"].nbytes < 0.56 * live.feature_maps_BSHWC.numel() * 2


def test_a_codec_that_ruins_the_features_is_refused_and_others_are_named(
    tmp_path: Path, images: Path
) -> None:
    """Features behind a ReLU: most are zero, and what is left is far from Gaussian."""
    teachers = {"t": TEACHER | {"model": "resnet10t", "codec": "int4"}}
    recipe = build_recipe(tmp_path / "cache", images, teachers=teachers)
    with pytest.raises(
        CodecError, match=r"int4 loses too much(.|\n)*1% below(.|\n)*int4-hadamard \(0.99"
    ) as refused:
        build(recipe, QUIET)
    assert not (tmp_path / "cache" / "cache.json").exists()
    text = str(refused.value)
    (suggested,) = re.findall(r"int4-rings|accept_loss=true", text)[:1]
    assert suggested == "int4-rings"

    cache = build(recipe.model_copy(update={"accept_loss": True}), QUIET).cache
    assert cache.spec.fidelity["t"]["cosine_p1"] < 0.95
    other = build_recipe(tmp_path / "other", images, teachers={"t": teachers["t"] | {"codec": suggested}})
    assert build(other, QUIET).cache.spec.fidelity["t"]["cosine_p1"] > 0.99


def test_a_build_says_where_raw_features_lose_more_than_standardised_ones(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained channels behind a ReLU differ so much that this is below .95; random ones do not."""
    monkeypatch.setattr("teachercache.cache_builder.calibrate.LEAST_COSINE", 0.975)
    teacher = TEACHER | {"model": "resnet10t"}
    teachers = {"bad": teacher | {"codec": "int3-hadamard"}, "good": teacher | {"codec": "int8-hadamard"}}
    console, recipe = Console(record=True, file=StringIO()), build_recipe(tmp_path, images, teachers=teachers)
    fidelity = build(recipe, console).cache.spec.fidelity["bad"]
    assert fidelity["raw_cosine_p1"] < 0.975 < fidelity["cosine_p1"]
    said = console.export_text()
    assert f"of teacher bad: 1% of the token cosines are below {fidelity['raw_cosine_p1']:.3f}" in said
    assert said.count("distillation.targets=standardised") == 1
    build(recipe, console)
    assert "standardised" not in console.export_text(), "said once"


def test_tables_are_part_of_what_a_row_is(tmp_path: Path, images: Path) -> None:
    recipe = build_recipe(tmp_path / "cache", images, teachers={"t": TEACHER | {"codec": "int4-hadamard"}})
    cache = build(recipe, QUIET).cache
    assert build(recipe, QUIET).shards == 0
    tables = tmp_path / "cache" / "stats" / "t.safetensors"
    data = bytearray(tables.read_bytes())
    data[-1] ^= 1
    tables.write_bytes(data)
    with pytest.raises(CacheError, match="is not what the features of t were encoded with"):
        FeatureCache.open(cache.storage.url).read([0])


def test_parts_with_the_tables_of_one_can_be_merged(tmp_path: Path, images: Path) -> None:
    more = tmp_path / "more"
    more.mkdir()
    for path in make_images(tmp_path / "plain", 5, seed=1).iterdir():
        path.rename(more / f"more_{path.name}")
    teachers = {"dataset": TEACHER | {"codec": "int4-hadamard"}, "plain": TEACHER | {"random_seed": 2}}
    first, apart = (
        build(build_recipe(tmp_path / name, source, teachers=teachers), QUIET).cache
        for name, source in (("first", images), ("apart", more))
    )
    with pytest.raises(CacheMismatchError, match=r"teachers\.dataset\.tables_hash(.|\n)*tables_from=FIRST"):
        merge([first.storage.url, apart.storage.url], str(tmp_path / "merged"))
    for name in ("cache.json", "stats/dataset.safetensors"):  # all that another machine needs of it
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "first" / name, tmp_path / "copy" / name)
    recipe = build_recipe(tmp_path / "second", more, teachers=teachers, tables_from=str(tmp_path / "copy"))
    second = build(recipe, QUIET).cache
    assert second.spec.teachers == first.spec.teachers
    assert second.spec.fidelity["dataset"] == first.spec.fidelity["dataset"]
    assert build(recipe, QUIET).shards == 0
    merged = merge([first.storage.url, second.storage.url], str(tmp_path / "merged")).run()
    assert verify(merged, full=True) == []
    live = build_teacher(second.spec.teachers["dataset"])(
        render_view(second.image(2), second.view(5), second.spec.teachers["dataset"].render_size)[None]
    )
    codes = second.codec("dataset").encode(live.feature_maps_BSHWC).decode()
    torch.testing.assert_close(second.read([5])["dataset"].decode(), codes, rtol=1e-3, atol=1e-3)
    with pytest.raises(CacheMismatchError, match=r"teachers\.dataset\.tables_hash: '\w+' there, '\w+' here"):
        build(recipe.model_copy(update={"cache": apart.storage.url}), QUIET)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec": "int8-hadamard"}, r"t\.codec: 'int4-hadamard' there, 'int8-hadamard' here"),
        ({"block_indices": [2, 5]}, r"t\.block_indices"),
        ({"grid": "bilinear", "grid_size": [2, 2]}, r"t\.grid"),
        ({"model": "vit_tiny_patch16_384"}, r"t\.model"),
        ({"random_seed": 1}, r"t\.random_seed"),
        ({"name": "u"}, r"teachers\.u: that cache has t"),
    ],
)
def test_tables_of_other_teachers_are_refused(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    """Before anything is loaded."""
    teacher = TEACHER | {"codec": "int4-hadamard"}
    specs = {"t": resolve_teacher("t", TeacherRecipe.model_validate(teacher), (32, 32))}
    first = make_cache(tmp_path / "first", images, teachers=specs, skip_shards=range(100))
    monkeypatch.setattr("teachercache.cache_builder.builder._runner", None)
    name = changes.pop("name", "t")
    recipe = build_recipe(
        tmp_path / "second", images, teachers={name: teacher | changes}, tables_from=first.storage.url
    )
    with pytest.raises(CacheMismatchError, match=message):
        build(recipe, QUIET)
    assert not (tmp_path / "second").exists()


def test_tables_of_other_weights_are_refused(tmp_path: Path, images: Path) -> None:
    """The same model, whose weights are known once it is loaded."""
    teachers = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(timm.create_model("test_vit.r160_in1k").state_dict(), tmp_path / f"{seed}.pth")
        teacher = {"model": "test_vit.r160_in1k", "image_size": 32, "codec": "int4-hadamard"}
        teachers.append({"t": teacher | {"checkpoint": str(tmp_path / f"{seed}.pth")}})
    first = build(build_recipe(tmp_path / "first", images, teachers=teachers[0]), QUIET).cache
    other = build_recipe(tmp_path / "second", images, teachers=teachers[1], tables_from=first.storage.url)
    with pytest.raises(CacheMismatchError, match=r"teachers\.t\.weights_hash"):
        build(other, QUIET)
    assert not [path for path in (tmp_path / "second").rglob("*") if path.is_file()]


def test_the_adjoint_grid_stores_what_the_loss_needs(tmp_path: Path, images: Path) -> None:
    teacher = TEACHER | {"codec": "f32", "grid": "adjoint", "grid_size": [2, 2]}
    cache = build(build_recipe(tmp_path / "cache", images, teachers={"t": teacher}), QUIET).cache
    spec = cache.spec.teachers["t"]
    assert (spec.native_grid, spec.stored_grid) == ((6, 6), (2, 2))
    live = build_teacher(spec)(render_view(cache.image(1), cache.view(3), spec.render_size)[None])
    stored, norms = stored_form(live.feature_maps_BSHWC, spec.grid)
    read = cache.read([3])["t"]
    torch.testing.assert_close(read.decode(), stored, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(read.arrays["norms"], norms, rtol=1e-5, atol=1e-4)


def measured(recipe: BuildRecipe) -> tuple[Plan, dict[str, list[Option]]]:
    drafted, spec, plan = prepare(recipe, QUIET)
    specs = {name: candidates(spec.teachers[name], (2, 2), 8) for name in recipe.teachers}
    return plan, dict(measure(specs, drafted.calibration_sample(8), batch_size=4))


def as_recommended(recipe: BuildRecipe, chosen: Mapping[str, Option]) -> BuildRecipe:
    """The recipe with the keys that `plan` would print."""
    teachers = {
        name: teacher.model_copy(
            update={
                "grid": chosen[name].spec.grid.kind,
                "grid_size": chosen[name].spec.grid.size,
                "codec": chosen[name].spec.codec,
            }
        )
        for name, teacher in recipe.teachers.items()
    }
    return recipe.model_copy(update={"teachers": teachers})


def test_a_budget_is_kept_at_the_least_loss(tmp_path: Path, images: Path) -> None:
    recipe = build_recipe(
        tmp_path / "cache",
        images,
        teachers={"t": TEACHER, "u": TEACHER | {"random_seed": 3}},
        images="copy",
        covariance=True,
    )
    plan, available = measured(recipe)
    assert {o.spec.codec for o in available["t"]} == set(codec_names("advised"))
    assert {(o.spec.grid.kind, o.spec.grid.size) for o in available["t"]} == {
        ("native", None),
        ("adjoint", (2, 2)),
    }
    largest = choose(available, plan, 10**12)
    assert {(o.spec.grid.kind, o.spec.codec) for o in largest.values()} == {("native", "f16")}
    features = plan.spec.num_rows * sum(option.bytes_per_row for option in largest.values())
    losses, least = [], plan.fixed_bytes
    for share in (1.0, 0.6, 0.3, 0.12, 0.05):
        budget = plan.fixed_bytes + int(share * features)
        chosen = choose(available, plan, budget)
        prepare(as_recommended(recipe, chosen), QUIET)[2].require(budget)
        losses.append(sum(option.loss for option in chosen.values()))
        possible = [
            sum(option.loss for option in pair)
            for pair in product(*available.values())
            if plan.fixed_bytes + plan.spec.num_rows * sum(one.bytes_per_row for one in pair) <= budget
        ]
        assert losses[-1] == pytest.approx(min(possible))
        least = budget
    assert losses == sorted(losses)
    assert least < plan.fixed_bytes + features / 10
    with pytest.raises(DiskSpaceError, match="at least"):
        choose(available, plan, plan.fixed_bytes + 100)


def test_one_finer_grid_is_given_up_before_any_codec(tmp_path: Path, images: Path) -> None:
    plan, available = measured(build_recipe(tmp_path / "cache", images, teachers={"t": TEACHER}))
    native = max(available["t"], key=lambda option: option.bytes_per_row)
    chosen = choose(available, plan, plan.fixed_bytes + plan.spec.num_rows * (native.bytes_per_row - 1))["t"]
    assert (chosen.spec.grid.kind, chosen.spec.codec) == ("adjoint", "f16")
    assert "teachers.t.grid_size=[2,2]" in chosen.overrides("t")


def test_a_recipe_can_name_the_smaller_grid(tmp_path: Path, images: Path) -> None:
    teacher = TEACHER | {"grid": "bilinear", "grid_size": [3, 2]}
    _, spec, _ = prepare(build_recipe(tmp_path / "cache", images, teachers={"t": teacher}), QUIET)
    found = candidates(spec.teachers["t"], (2, 2), num_rows=2)
    assert {(one.grid.kind, one.grid.size) for one in found} == {("native", None), ("bilinear", (3, 2))}
    assert "int4-dct" not in {one.codec for one in found}


def test_what_pooling_loses_counts(tmp_path: Path, images: Path) -> None:
    """A pooled grid keeps little of random features: a coarse codec on the native grid is better."""
    teacher = TEACHER | {"grid": "bilinear", "grid_size": [3, 3]}
    plan, available = measured(build_recipe(tmp_path / "cache", images, teachers={"t": teacher}))
    pooled = [option for option in available["t"] if option.spec.grid.kind == "bilinear"]
    (kept,) = {option.grid_cosine for option in pooled}
    assert 0.2 < kept < 0.98
    assert {option.grid_cosine for option in available["t"] if option not in pooled} == {1.0}
    smallest = min(option.bytes_per_row for option in pooled if option.spec.codec == "f16")
    chosen = choose(available, plan, plan.fixed_bytes + plan.spec.num_rows * (smallest + 40))["t"]
    assert (chosen.spec.grid.kind, chosen.spec.codec) != ("bilinear", "f16")


def test_massive_activations_get_no_coarser_codec(tmp_path: Path, images: Path) -> None:
    """They are stored almost exactly, and would hide the error of all other values in a relative L2."""
    plan, available = measured(build_recipe(tmp_path / "cache", images, teachers={"t": TEACHER}))
    spec = available["t"][0].spec
    generator = torch.Generator().manual_seed(0)
    white_RSHWC = torch.randn(4, 2, 12, 12, 256, generator=generator)
    massive_RSHWC = white_RSHWC.clone()
    massive_RSHWC[:, :, ::5, ::5, 7] += 1000
    options = {
        name: [
            Option(
                spec.model_copy(update={"codec": codec}),
                measure_fidelity(get_codec(codec).calibrate(features_RSHWC), features_RSHWC),
            )
            for codec in codec_names("advised")
            if codec != "int4-dct"
        ]
        for name, features_RSHWC in (("plain", white_RSHWC), ("massive", massive_RSHWC))
    }
    for plain, massive in zip(*options.values(), strict=True):
        assert massive.loss == pytest.approx(plain.loss, rel=0.1, abs=1e-6)
    smallest, largest = (pick(o.bytes_per_row for o in options["plain"]) for pick in (min, max))
    for share in (0.25, 0.5, 0.75):
        per_row = round(2 * (smallest + share * (largest - smallest)))
        chosen = choose(options, plan, plan.fixed_bytes + plan.spec.num_rows * per_row)
        sizes = sorted(option.bytes_per_row for option in chosen.values())
        ranks = sorted({option.bytes_per_row for option in options["plain"]})
        assert abs(ranks.index(sizes[1]) - ranks.index(sizes[0])) <= 1


@pytest.mark.parametrize("covariance", [False, True])
def test_a_plan_counts_the_statistics(tmp_path: Path, images: Path, covariance: bool) -> None:
    recipe = build_recipe(tmp_path / "cache", images, covariance=covariance)
    planned = prepare(recipe, QUIET)[2]
    build(recipe, QUIET)
    files = [path.stat().st_size for path in (tmp_path / "cache" / "stats" / "tiny").iterdir()]
    assert sum(files) <= planned.fixed_bytes <= sum(files) + 512 * len(files)
    assert planned.missing_bytes == planned.total_bytes


def test_a_build_over_its_budget_is_refused(tmp_path: Path, images: Path) -> None:
    with pytest.raises(DiskSpaceError, match="larger than its budget"):
        build(build_recipe(tmp_path / "cache", images, budget="10 kB"), QUIET)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["cls", "global"])
def test_token_features_beyond_their_dtype_are_refused(tmp_path: Path, images: Path, name: str) -> None:
    teachers = {codec: TEACHER | {"codec": codec, "cls_token": True} for codec in ("bf16", "f32")}
    specs = prepare(build_recipe(tmp_path / "cache", images, teachers=teachers), QUIET)[1].teachers
    half, single = (specs[codec].model_copy(update={"global_width": 3}) for codec in ("bf16", "f32"))
    huge = torch.full((1, 4, 3), 7e4)
    maps, moments = torch.zeros(1, 4, 2, 2, 3), FeatureMoments.empty(1, 3)
    features = TeacherFeatures(maps, *((huge, None) if name == "cls" else (None, huge)))
    assert _tokens(single, features)[name].max() == 7e4
    with pytest.raises(CodecError, match=f"bf16 cannot hold these {name} features(.|\n)*choose f32"):
        Computed(get_codec("bf16"), _tokens(half, features), torch.tensor(True), moments).arrays()


@pytest.mark.parametrize(
    ("text", "count"), [("6TB", 6 * 10**12), ("500 GB", 5 * 10**11), ("1.5e+3", 1500), ("12", 12)]
)
def test_budgets_are_read(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["much", "6 XB", "", "1..2GB", "1e400TB"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="not a number of bytes"):
        parse_bytes(text)
