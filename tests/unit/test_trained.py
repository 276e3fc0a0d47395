"""Teachers that were really trained: their checkpoints are what other implementations compute with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import trained
from teachercache.cache_builder.build_recipe import BuildRecipe
from teachercache.cache_builder.teachers import TeacherRecipe, build_teacher, resolve_teacher
from teachercache.jobs.demo import teachers
from teachercache.jobs.recipes import find_recipe
from teachercache.pipeline.codecs import get_codec
from teachercache.pipeline.codecs.fidelity import measure_fidelity
from teachercache.pipeline.errors import TeacherInputError

needs_packages = pytest.mark.skipif(bool(trained.missing()), reason=trained.missing() or "all is installed")


@needs_packages
def test_every_level_is_that_of_the_other_implementation_but_for_antialiased_positions() -> None:
    differences = trained.compare()
    assert {name: len(levels) for name, levels in differences.items()} == {
        trained.DINOV2: 12,
        trained.VGG: 1,
        trained.ANTIALIASED: 12,
    }
    assert max(differences[trained.DINOV2] + differences[trained.VGG]) < 1e-5
    assert min(differences[trained.ANTIALIASED]) > 1e-2


@needs_packages
def test_four_bits_keep_the_features_of_a_trained_teacher() -> None:
    sample, others = (trained.features(trained.DINOV2, 4, (16, 16), seed) for seed in (0, 1))
    found = measure_fidelity(get_codec("int4-hadamard").calibrate(sample), others)
    assert found.cosine_mean >= 0.995
    assert found.cosine_p1 >= 0.992


@needs_packages
def test_checkpoints_are_written_once(tmp_path: Path) -> None:
    paths = trained.write_checkpoints(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in paths.values()}
    assert trained.write_checkpoints(tmp_path) == paths
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_spec_says_how_positions_are_resampled_only_where_it_is_not_as_always() -> None:
    usual, plain = (
        resolve_teacher("dinov2_small", TeacherRecipe(resample_positions=kind), (224, 224))
        for kind in ("antialias", "plain")
    )
    assert not {"resample_positions", "layer_scale"} & set(usual.model_dump())
    assert plain.model_dump() == usual.model_dump() | {"resample_positions": "plain"}
    assert type(plain).model_validate(plain.model_dump()) == plain


@pytest.mark.parametrize("model", ["samvit_base_patch16", "convnext_tiny"])
def test_a_teacher_without_a_map_of_positions_takes_no_way_to_resample_it(model: str) -> None:
    with pytest.raises(TeacherInputError, match=r"no map of learnt positions(.|\n)*expected: .*antialias"):
        resolve_teacher("a", TeacherRecipe(model=model, resample_positions="plain"), (256, 256))


def test_a_teacher_without_layer_scale_takes_none() -> None:
    recipe = TeacherRecipe(model="vit_tiny_patch16_224", pretrained=False, layer_scale=1)
    with pytest.raises(TeacherInputError, match="has no LayerScale"):
        resolve_teacher("a", recipe, (224, 224))


def test_random_weights_have_no_positions_to_resample() -> None:
    with pytest.raises(ValueError, match="leave resample_positions out"):
        TeacherRecipe(model="dinov2_small", pretrained=False, resample_positions="plain")


def test_the_demo_takes_a_trained_teacher_beside_random_ones(tmp_path: Path) -> None:
    checkpoint = tmp_path / "with space, and comma.safetensors"
    ours, random = (
        find_recipe(BuildRecipe, "photos_cache", teachers(False, file)).teachers
        for file in (checkpoint, None)
    )
    trained_dinov2 = TeacherRecipe(preset="dinov2_small", checkpoint=str(checkpoint))
    assert ours == random | {"dinov2": trained_dinov2}


def test_the_random_dinov2_of_the_demo_differs_from_level_to_level() -> None:
    dinov2 = find_recipe(BuildRecipe, "photos_cache", teachers(False, None)).teachers["dinov2"]
    pixels = torch.randint(0, 256, (1, 3, 56, 56), dtype=torch.uint8)
    likeness = []
    for recipe in (dinov2, dinov2.model_copy(update={"layer_scale": None})):
        spec = resolve_teacher("dinov2", recipe, (56, 56))
        levels_SNC = build_teacher(spec)(pixels).feature_maps_BSHWC[0].flatten(1, 2)
        likeness.append(torch.cosine_similarity(levels_SNC[1:], levels_SNC[:-1], dim=-1).mean().item())
    assert likeness[0] < 0.97
    assert likeness[1] > 0.9999
