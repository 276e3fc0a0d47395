"""Teachers: from a recipe to features.

The goldens are the features of the small presets on one fixed tensor, with random weights. After a
change that is meant to move them: `python tests/unit/test_teachers.py` writes them again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from teachercache.cache_builder.teachers import (
    Teacher,
    TeacherRecipe,
    build_teacher,
    resolve_teacher,
)
from teachercache.cache_builder.teachers.registry import presets, teacher_gmacs
from teachercache.cache_builder.teachers.sam_attention import fold_positions
from teachercache.cache_builder.teachers.teacher import autocast, preprocess, weights_hash
from teachercache.pipeline.errors import (
    CacheMismatchError,
    TeacherInputError,
    UnknownTeacherError,
    WeightsNotFoundError,
)
from teachercache.pipeline.records.spec import TeacherSpec

GOLDENS = Path(__file__).parents[1] / "goldens" / "teachers.json"
SMALL = {
    "dinov2_small": 98,
    "dinov3_small": 64,
    "openai_clip_base_patch32": 64,
    "sam_base": 64,
    "siglip2_base": 64,
}
TINY = "test_vit.r160_in1k"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def pixels(size: tuple[int, int], batch: int = 2) -> Tensor:
    """Fixed uint8 views (B, 3, H, W), by arithmetic: no generator decides what the goldens see."""
    values = torch.arange(batch * 3 * size[0] * size[1]).view(batch, 3, *size)
    return ((values * 7919 + values // 97) % 256).to(torch.uint8)


@cache
def small_teacher(name: str) -> Teacher:
    return build_teacher(name, pretrained=False, image_size=SMALL[name])


def by_hand(spec: TeacherSpec, **size: tuple[int, int]) -> Any:
    torch.manual_seed(spec.random_seed)
    return timm.create_model(spec.model, pretrained=False, **size).eval()


def normalised(pixels_B3HW: Tensor, spec: TeacherSpec) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    return (pixels_B3HW / 255 - mean) / std


def test_threads_make_the_weights_of_the_seed() -> None:
    expected = build_teacher(TINY, pretrained=False, image_size=64).weights_hash
    with ThreadPoolExecutor(4) as pool:
        teachers = pool.map(lambda _: build_teacher(TINY, pretrained=False, image_size=64), range(16))
        assert {teacher.weights_hash for teacher in teachers} == {expected}


@pytest.mark.parametrize("name", [name for name in presets() if not name.startswith("grounding_dino")])
def test_every_preset_names_pretrained_weights(name: str) -> None:
    assert presets()[name].model in timm.list_pretrained()


@pytest.mark.parametrize(
    ("name", "view_size", "image_size", "grid"),
    [
        ("dinov2_small", (384, 384), (378, 378), (27, 27)),
        ("dinov2_small", (448, 576), (448, 574), (32, 41)),
        ("dinov2_small", (512, 512), (518, 518), (37, 37)),
        ("openclip_base", (384, 384), (384, 384), (24, 24)),
        ("siglip2_base", (448, 576), (448, 576), (28, 36)),
        ("dinov3_small", (400, 390), (400, 384), (25, 24)),
        ("sam_base", (384, 384), (1024, 1024), (64, 64)),
        ("sam_base", (448, 576), (800, 1024), (50, 64)),
        ("samvit_base_patch16", (384, 384), (1024, 1024), (64, 64)),
    ],
)
def test_a_teacher_sees_the_view_in_whole_patches(
    name: str, view_size: tuple[int, int], image_size: tuple[int, int], grid: tuple[int, int]
) -> None:
    spec = resolve_teacher(name, TeacherRecipe(), view_size)
    assert spec.image_size == spec.render_size == image_size
    assert spec.native_grid == grid
    assert spec.weights_hash is None


def test_statistics_are_the_models_own() -> None:
    size = (384, 384)
    assert resolve_teacher("openai_clip_base", TeacherRecipe(), size).mean[0] == pytest.approx(0.48145466)
    assert resolve_teacher("siglip2_base", TeacherRecipe(), size).std == (0.5, 0.5, 0.5)
    assert resolve_teacher("siglip2_base", TeacherRecipe(mean=(0, 0, 0)), size).mean == (0, 0, 0)


def test_sak_compat_keeps_the_view_and_imagenet_statistics() -> None:
    size = (384, 384)
    dino = resolve_teacher("dinov2_small", TeacherRecipe(), size, sak_compat=True)
    clip = resolve_teacher("openai_clip_base_patch32", TeacherRecipe(), size, sak_compat=True)
    sam = resolve_teacher("sam_base", TeacherRecipe(), size, sak_compat=True)
    assert (dino.image_size, dino.native_grid) == (size, (27, 27))
    assert (clip.mean, clip.std) == IMAGENET
    assert (sam.render_size, sam.image_size) == (size, (1024, 1024))


def test_sak_compat_drops_the_pixels_that_fill_no_patch() -> None:
    spec = resolve_teacher("dinov2_small", TeacherRecipe(pretrained=False), (104, 104), sak_compat=True)
    teacher, views = build_teacher(spec), pixels((104, 104))
    before = teacher(views).feature_maps_BSHWC
    views[..., 98:] = views[..., 98:, :] = 0
    assert torch.equal(teacher(views).feature_maps_BSHWC, before)
    assert before.shape == (2, 4, 7, 7, 384)


@pytest.mark.parametrize("view_size", [(48, 48), (48, 60), (60, 48)])
def test_sak_compat_enlarges_and_pads_as_the_reference_does(view_size: tuple[int, int]) -> None:
    spec = resolve_teacher("sam_base", TeacherRecipe(image_size=128), view_size, sak_compat=True)
    views = pixels(view_size)
    scale = 128 / max(view_size)
    height, width = int(view_size[0] * scale + 0.5), int(view_size[1] * scale + 0.5)
    x = F.interpolate(normalised(views, spec), (height, width), mode="bicubic", align_corners=False)
    expected = torch.zeros(2, 3, 128, 128)
    expected[..., :height, :width] = x
    torch.testing.assert_close(preprocess(views, spec), expected)


def test_a_recipe_may_name_a_preset_or_a_model() -> None:
    size = (224, 224)
    by_name = resolve_teacher("dinov2_small", TeacherRecipe(), size)
    assert resolve_teacher("a", TeacherRecipe(preset="dinov2_small"), size) == by_name
    assert resolve_teacher("b", TeacherRecipe(model="vit_small_patch14_dinov2"), size) == by_name
    assert resolve_teacher("vit_small_patch14_dinov2.lvd142m", TeacherRecipe(), size) == by_name


@pytest.mark.parametrize(
    ("name", "recipe", "nearest"),
    [
        ("dinov2_smal", TeacherRecipe(), "dinov2_small"),
        ("a", TeacherRecipe(preset="sam_bse"), "sam_base"),
        ("b", TeacherRecipe(model="vit_base_patch16_clip_224.laion2c"), "vit_base_patch16_clip_224.laion2b"),
        ("qqqqqqqqqq", TeacherRecipe(), "dinov3_7b"),
    ],
)
def test_an_unknown_teacher_names_the_nearest(name: str, recipe: TeacherRecipe, nearest: str) -> None:
    with pytest.raises(UnknownTeacherError, match=nearest):
        resolve_teacher(name, recipe, (384, 384))


def test_an_image_size_of_broken_patches_is_refused() -> None:
    recipe = TeacherRecipe(image_size=384)
    with pytest.raises(TeacherInputError, match=r"384×384(.|\n)*multiples of 14×14(.|\n)*\[378, 378\]"):
        resolve_teacher("dinov2_small", recipe, (384, 384))
    assert resolve_teacher("dinov2_small", recipe, (384, 384), sak_compat=True).native_grid == (27, 27)


def test_a_size_that_timm_refuses_is_told_with_its_reason() -> None:
    with pytest.raises(TeacherInputError, match=r"broadcast(.|\n)*made for \(240, 240\)"):
        resolve_teacher("t", TeacherRecipe(model="crossvit_9_240"), (384, 384))


def test_blocks_are_the_ends_of_the_quarters_unless_chosen() -> None:
    size = (224, 224)
    assert resolve_teacher("openclip_large", TeacherRecipe(), size).block_indices == (5, 11, 17, 23)
    assert resolve_teacher("siglip2_so400m", TeacherRecipe(), size).block_indices == (6, 13, 20, 26)
    assert resolve_teacher("dinov2_small", TeacherRecipe(block_indices=(3,)), size).num_levels == 1
    with pytest.raises(TeacherInputError, match="from 0 to 11"):
        resolve_teacher("dinov2_small", TeacherRecipe(block_indices=(3, 12)), size)


def test_levels_of_several_shapes_are_refused_with_the_shapes() -> None:
    recipe = TeacherRecipe(model="convnext_tiny", block_indices=(2, 3))
    with pytest.raises(TeacherInputError, match="2: width 384, grid 14×14; 3: width 768, grid 7×7"):
        resolve_teacher("t", recipe, (224, 224))


@pytest.mark.parametrize(
    ("model", "width"), [("convnext_tiny", 768), ("swin_tiny_patch4_window7_224", 768), ("resnet18", 512)]
)
def test_a_network_of_stages_gives_its_last_one(model: str, width: int) -> None:
    spec = resolve_teacher("t", TeacherRecipe(model=model), (224, 224))
    assert (spec.num_levels, spec.width, spec.native_grid) == (1, width, (7, 7))


def test_compiled_blocks_give_the_same_features_from_one_graph_whatever_is_left_for_the_last_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graphs = []

    def note(graph: Any, _: Any) -> Any:  # a code generator takes minutes on a CPU
        graphs.append(graph)
        return graph

    compiler = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda block, **how: compiler(block, backend=note, **how))
    options: dict[str, Any] = {"pretrained": False, "cls_token": True, "global_feature": True}
    plain, compiled = (build_teacher(TINY, image_size=64, **options) for _ in range(2))
    compiled.compile_blocks(batch_size=3)
    blocks = [name for name, module in compiled.named_modules() if module._compiled_call_impl is not None]
    assert blocks == [f"model.blocks.{number}" for number in range(len(blocks))]
    assert blocks
    for batch in (3, 1, 2):
        views = pixels((64, 64), batch)
        for actual, expected in zip(vars(compiled(views)).values(), vars(plain(views)).values(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1


def test_compiled_code_gives_the_same_features() -> None:
    views = pixels((64, 64))
    plain, compiled = (build_teacher(TINY, pretrained=False, image_size=64) for _ in range(2))
    compiled.compile_blocks(batch_size=2)
    expected = plain(views).feature_maps_BSHWC
    torch.testing.assert_close(compiled(views).feature_maps_BSHWC, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (240, 272)], ids=str)
def test_attention_with_folded_positions_is_timms(size: tuple[int, int]) -> None:
    spec = resolve_teacher("sam_base", TeacherRecipe(image_size=size, pretrained=False), size)
    theirs = by_hand(spec)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "rel_pos" in name:  # zeros, in a new model
                parameter.normal_(std=0.2)
    ours = deepcopy(theirs)
    names = list(ours.state_dict())
    fold_positions(ours, spec.native_grid)
    assert list(ours.state_dict()) == names
    images = normalised(pixels(size, 1), spec)
    with torch.no_grad():
        expected, actual, rounded = (
            torch.stack(run(model, images, exact))
            for model, exact in ((theirs, True), (ours, True), (theirs, False))
        )
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(rounded, expected, rtol=1e-4, atol=1e-4)
        assert F.cosine_similarity(torch.stack(run(ours, images, False)), expected, dim=2).min() > 0.9999


def run(model: Any, images: Tensor, exact: bool) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=not exact):
        maps: list[Tensor] = model.forward_intermediates(images, intermediates_only=True)
    return [one.float() for one in maps]


@pytest.mark.parametrize("name", SMALL)
def test_weights_kept_in_bfloat16_give_what_autocast_gives(name: str) -> None:
    rounded = build_teacher(name, pretrained=False, image_size=SMALL[name], precision="bfloat16")
    dtypes = {module.weight.dtype for module in rounded.modules() if isinstance(module, nn.Linear)}
    assert dtypes == {torch.bfloat16}
    assert rounded.weights_hash == small_teacher(name).weights_hash
    with autocast(rounded.spec, torch.device("cpu")):
        expected = small_teacher(name)(pixels((SMALL[name], SMALL[name]))).feature_maps_BSHWC
    assert torch.equal(rounded(pixels((SMALL[name], SMALL[name]))).feature_maps_BSHWC, expected)


@pytest.mark.parametrize("name", ["dinov2_small", "sam_base"])
def test_a_pass_copies_nothing_from_another_device(name: str) -> None:
    copies = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
            if len({one.device.type for one in tensors if one.ndim}) > 1 or "device" in (kwargs or {}):
                copies.append((function, kwargs))
            return function(*args, **(kwargs or {}))

    spec = small_teacher(name).spec
    with torch.device("meta"):
        teacher = type(small_teacher(name))(spec)
    views = torch.empty(1, 3, *spec.render_size, dtype=torch.uint8, device="meta")
    teacher(views)
    with Watch():
        teacher(views)
    assert copies == []


@pytest.mark.parametrize("name", ["sam_base", "siglip2_base"])
def test_a_model_without_class_token_refuses_to_give_one(name: str) -> None:
    with pytest.raises(TeacherInputError, match="no cls_token"):
        resolve_teacher(name, TeacherRecipe(cls_token=True), (384, 384))


def test_sam_refuses_to_give_a_global_feature() -> None:
    with pytest.raises(TeacherInputError, match="no global_feature"):
        resolve_teacher("sam_base", TeacherRecipe(global_feature=True), (384, 384))


def test_a_pooled_grid_defaults_to_the_students() -> None:
    recipe = TeacherRecipe(grid="bilinear")
    assert resolve_teacher("sam_base", recipe, (448, 576)).stored_grid == (28, 36)
    recipe = TeacherRecipe(grid="bilinear", grid_size=(7, 9))
    assert resolve_teacher("sam_base", recipe, (448, 576)).stored_grid == (7, 9)


@pytest.mark.parametrize(
    "keys",
    [
        {"preset": "sam_base", "model": "samvit_base_patch16"},
        {"grid_size": (24, 24)},
        {"pretrained": False, "checkpoint": "weights.safetensors"},
        {"block_indices": (3, 2)},
        {"block_indices": (-1,)},
        {"block_indices": ()},
        {"layer_scale": 1},
        {"pretrained": False, "layer_scale": 0},
        {"image_size": 0},
        {"imagesize": 224},
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(reversed(keys))):
        TeacherRecipe(**keys)


@pytest.mark.parametrize("name", SMALL)
def test_features_equal_timm_by_hand(name: str) -> None:
    teacher = small_teacher(name)
    spec = teacher.spec
    model = by_hand(spec, img_size=spec.image_size)
    views = pixels(spec.render_size)
    with torch.no_grad():
        maps = model.forward_intermediates(
            normalised(views, spec), indices=[2, 5, 8, 11], norm=False, intermediates_only=True
        )
    features = teacher(views)
    assert features.feature_maps_BSHWC.is_contiguous()
    assert features.feature_maps_BSHWC.shape == (2, 4, *spec.native_grid, spec.width)
    assert features.cls_token_BSC is features.global_feature_BD is None
    for level, expected in enumerate(maps):
        actual = features.feature_maps_BSHWC[:, level].permute(0, 3, 1, 2)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def golden(name: str) -> list[dict[str, Any]]:
    """Mean, standard deviation and eight values of each level."""
    maps = small_teacher(name)(pixels((SMALL[name],) * 2)).feature_maps_BSHWC
    levels = (maps[:, level] for level in range(maps.shape[1]))
    return [
        {
            "mean": level.mean().item(),
            "std": level.std().item(),
            "values": level.flatten()[:: level.numel() // 8][:8].tolist(),
        }
        for level in levels
    ]


@pytest.mark.parametrize("name", SMALL)
def test_features_equal_the_golden(name: str) -> None:
    expected = json.loads(GOLDENS.read_text("utf-8"))[name]
    for actual, level in zip(golden(name), expected, strict=True):
        for key in ("mean", "std", "values"):
            assert actual[key] == pytest.approx(level[key], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    "name", ["dinov2_small_reg", "dinov3_small", "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m"]
)
def test_cls_token_and_global_feature(name: str) -> None:
    teacher = build_teacher(name, pretrained=False, image_size=112, cls_token=True, global_feature=True)
    spec = teacher.spec
    model = by_hand(spec, img_size=spec.image_size)
    tokens: list[Tensor] = []
    for index in spec.block_indices:
        model.blocks[index].register_forward_hook(lambda _, __, out: tokens.append(out[:, 0]))
    views = pixels(spec.render_size)
    with torch.no_grad():
        pooled = model(normalised(views, spec))
    features = teacher(views)
    torch.testing.assert_close(features.cls_token_BSC, torch.stack(tokens, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features.global_feature_BD, pooled, rtol=1e-5, atol=1e-5)
    assert pooled.shape == (2, spec.global_width)


def test_a_register_is_no_class_token_but_pooling_works() -> None:
    keys: dict[str, Any] = {"pretrained": False, "image_size": 64, "block_indices": (8,)}
    with pytest.raises(TeacherInputError, match="no cls_token"):
        build_teacher("test_vit3", cls_token=True, **keys)
    teacher = build_teacher("test_vit3", global_feature=True, **keys)
    views = pixels((64, 64))
    with torch.no_grad():
        expected = by_hand(teacher.spec, img_size=(64, 64))(normalised(views, teacher.spec))
    torch.testing.assert_close(teacher(views).global_feature_BD, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", ["test_convnext", "test_resnet", "swin_tiny_patch4_window7_224"])
def test_other_architectures_give_single_levels(model: str) -> None:
    recipe = TeacherRecipe(model=model, block_indices=(2,), pretrained=False)
    spec = resolve_teacher("t", recipe, (96, 128))
    maps = build_teacher(spec)(pixels((96, 128))).feature_maps_BSHWC
    assert maps.shape == (2, 1, *spec.native_grid, spec.width)
    assert maps.std() > 0


def test_sam_takes_views_that_are_not_square() -> None:
    spec = resolve_teacher("sam_base", TeacherRecipe(image_size=(48, 64), pretrained=False), (48, 64))
    assert build_teacher(spec)(pixels((48, 64))).feature_maps_BSHWC.shape == (2, 4, 3, 4, 768)


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_is_near_float32(name: str) -> None:
    teacher, views = small_teacher(name), pixels((SMALL[name],) * 2)
    exact = teacher(views).feature_maps_BSHWC
    spec = teacher.spec
    teacher.spec = spec.model_copy(update={"precision": "bfloat16"})
    try:
        rounded = teacher(views).feature_maps_BSHWC.float()
    finally:
        teacher.spec = spec
    assert not torch.equal(rounded, exact)
    assert F.cosine_similarity(rounded, exact, dim=-1).min() > 0.999


def test_a_loss_can_be_taken_against_the_features() -> None:
    teacher = build_teacher(TINY, pretrained=False, image_size=64, cls_token=True, global_feature=True)
    features = teacher(pixels((64, 64)))
    for target in (features.feature_maps_BSHWC, features.cls_token_BSC, features.global_feature_BD):
        assert target is not None
        student = torch.ones_like(target, requires_grad=True)
        (student * target).sum().backward()
        assert torch.equal(student.grad, target)  # type: ignore[arg-type]


def test_a_teacher_is_frozen_and_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    teacher = build_teacher(TINY, pretrained=False, image_size=64)
    assert torch.equal(torch.get_rng_state(), before)
    assert not teacher.model.training  # type: ignore[union-attr]
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("views", [pixels((48, 64)), pixels((64, 64)).float(), pixels((64, 64))[0]])
def test_anything_but_views_at_the_render_size_is_refused(views: Tensor) -> None:
    teacher = build_teacher(TINY, pretrained=False, image_size=64)
    with pytest.raises(TeacherInputError, match=r"\(B, 3, 64, 64\)"):
        teacher(views)


def test_a_spec_takes_no_overrides() -> None:
    with pytest.raises(TypeError, match="random_seed"):
        build_teacher(build_teacher(TINY, pretrained=False, image_size=64).spec, random_seed=1)


def save(state: dict[str, Tensor], path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def tiny_weights(path: Path, model: str = TINY) -> Path:
    torch.manual_seed(7)
    return save(timm.create_model(model).state_dict(), path)


def test_a_checkpoint_is_loaded_and_its_positions_resampled(tmp_path: Path) -> None:
    path = tiny_weights(tmp_path / "vit.safetensors", "vit_tiny_patch16_224")
    teacher = build_teacher("vit_tiny_patch16_224", checkpoint=str(path), image_size=(96, 128))
    model = timm.create_model(
        "vit_tiny_patch16_224", True, pretrained_cfg_overlay={"file": str(path)}, img_size=(96, 128)
    ).eval()
    views = pixels((96, 128))
    with torch.no_grad():
        expected = model.forward_intermediates(normalised(views, teacher.spec), intermediates_only=True)[-1]
    actual = teacher(views).feature_maps_BSHWC[:, -1].permute(0, 3, 1, 2)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert teacher.model.pos_embed.shape[1] == 1 + 6 * 8  # type: ignore[union-attr, index]
    assert torch.equal(teacher.model.blocks[3].mlp.fc1.weight, load_file(path)["blocks.3.mlp.fc1.weight"])  # type: ignore[union-attr, index]


def test_sam_weights_load_at_any_size(tmp_path: Path) -> None:
    path = tiny_weights(tmp_path / "sam.safetensors", "samvit_base_patch16")
    teacher = build_teacher("sam_base", checkpoint=str(path), image_size=(48, 64))
    assert teacher.weights_hash == weights_hash_of(path)
    assert torch.isfinite(teacher(pixels((48, 64))).feature_maps_BSHWC).all()


def weights_hash_of(path: Path) -> str:
    module = nn.Module()
    module.state_dict = lambda: {f"model.{name}": t for name, t in load_file(path).items()}  # type: ignore[method-assign, assignment]
    return weights_hash(module)


@pytest.mark.parametrize("model", [TINY, "test_convnext.r160_in1k"])  # timm loads the second one leniently
def test_every_key_must_be_there_and_known(model: str, tmp_path: Path) -> None:
    state = load_file(tiny_weights(tmp_path / "whole.safetensors", model))
    lost = next(name for name in state if "norm" in name)
    lacking = save({k: v for k, v in state.items() if k != lost}, tmp_path / "lacking.safetensors")
    with pytest.raises(WeightsNotFoundError, match=f"missing {lost}"):
        build_teacher(model, checkpoint=str(lacking), block_indices=(1,))
    excessive = save(state | {"stray": torch.zeros(1)}, tmp_path / "excessive.safetensors")
    with pytest.raises(WeightsNotFoundError, match="unexpected stray"):
        build_teacher(model, checkpoint=str(excessive), block_indices=(1,))


def test_only_the_classifier_may_be_missing(tmp_path: Path) -> None:
    state = load_file(tiny_weights(tmp_path / "whole.safetensors"))
    headless = {k: v for k, v in state.items() if not k.startswith("head.")}
    path = str(save(headless, tmp_path / "headless.safetensors"))
    build_teacher(TINY, checkpoint=path, image_size=64)
    with pytest.raises(WeightsNotFoundError, match=r"missing head\.weight"):
        build_teacher(TINY, checkpoint=path, image_size=64, global_feature=True)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.abort, ())


def test_a_checkpoint_file_is_not_unpickled(tmp_path: Path) -> None:
    torch.manual_seed(7)
    state = timm.create_model(TINY).state_dict()
    torch.save(state, tmp_path / "plain.pth")
    torch.save(state | {"harmful": Harmful()}, tmp_path / "harmful.pth")
    plain = build_teacher(TINY, checkpoint=str(tmp_path / "plain.pth"), image_size=64)
    assert plain.weights_hash == weights_hash_of(tiny_weights(tmp_path / "same.safetensors"))
    with pytest.raises(WeightsNotFoundError, match="weights_only"):
        build_teacher(TINY, checkpoint=str(tmp_path / "harmful.pth"), image_size=64)


def _behind(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    "saved",
    [
        pytest.param(
            lambda good, bad: {
                "teacher": _behind("backbone.", good) | {"dino_head.mlp.0.weight": bad["norm.bias"]}
            },
            id="DINOv2",
        ),
        pytest.param(
            lambda good, _: {
                "teacher": {
                    re.sub(
                        r"blocks\.(\d+)", lambda block: f"blocks.{int(block[1]) // 3}.{block[1]}", name
                    ): tensor
                    for name, tensor in _behind("backbone.", good).items()
                }
            },
            id="DINOv2 with blocks in chunks",
        ),
        pytest.param(
            lambda good, bad: {
                "student": _behind("module.backbone.", bad),
                "teacher": _behind("backbone.", good) | {"head.last_layer.weight_v": bad["norm.bias"]},
                "optimizer": {"state": {0: {"exp_avg": bad["norm.bias"]}}, "param_groups": [{"lr": 0.1}]},
                "epoch": 3,
                "args": argparse.Namespace(arch="vit_tiny"),
            },
            id="DINO and iBOT",
        ),
        pytest.param(lambda good, _: {"student": _behind("module.backbone.", good)}, id="a student alone"),
        pytest.param(lambda good, bad: {"model": bad, "model_ema": good}, id="model_ema"),
        pytest.param(lambda good, bad: {"state_dict": bad, "state_dict_ema": good}, id="timm's own"),
        pytest.param(lambda good, _: {"state_dict": _behind("module.", good)}, id="DDP"),
        pytest.param(lambda good, _: {"model": _behind("module.", good)}, id="model of DDP"),
        pytest.param(lambda good, _: {"state_dict": _behind("model.encoder.", good)}, id="Lightning"),
        pytest.param(lambda good, _: _behind("backbone.", good), id="backbone"),
    ],
)
def test_what_training_codes_save_is_loaded(tmp_path: Path, saved: Callable[..., object]) -> None:
    good, bad = (timm.create_model(TINY).state_dict() for _ in range(2))
    torch.save(good, tmp_path / "plain.pth")
    torch.save(saved(good, bad), tmp_path / "teacher_checkpoint.pth")
    plain, loaded = (
        build_teacher(TINY, checkpoint=str(tmp_path / name), image_size=32)
        for name in ("plain.pth", "teacher_checkpoint.pth")
    )
    assert loaded.weights_hash == plain.weights_hash
    model: Any = loaded.model
    assert "state_dict" not in model.pretrained_cfg, "nor are they kept twice"


@pytest.mark.parametrize(
    ("saved", "told"),
    [
        (
            {"teacher": {"backbone.a": torch.zeros(2), "backbone.b": torch.zeros(2)}, "epoch": 3},
            r"the file holds teacher: 2 tensors \(backbone.a, backbone.b\)",
        ),
        ({f"layer{i}.weight": torch.zeros(2) for i in range(5)}, r"holds 5 tensors \(layer0.weight, .*, …\)"),
        ({"epoch": 3}, "the file holds no tensor"),
    ],
)
def test_a_checkpoint_of_another_model_says_what_it_holds(
    tmp_path: Path, saved: dict[str, object], told: str
) -> None:
    torch.save(saved, tmp_path / "other.pth")
    with pytest.raises(WeightsNotFoundError, match=told):
        build_teacher(TINY, checkpoint=str(tmp_path / "other.pth"), image_size=32)


def test_two_models_in_one_entry_are_not_guessed(tmp_path: Path) -> None:
    one, other = (timm.create_model(TINY).state_dict() for _ in range(2))
    both = _behind("base_encoder.", one) | _behind("momentum_encoder.", other)
    torch.save({"state_dict": both}, tmp_path / "moco.pth")
    with pytest.raises(WeightsNotFoundError, match=r"tensors \(base_encoder\.cls_token"):
        build_teacher(TINY, checkpoint=str(tmp_path / "moco.pth"), image_size=32)


def test_a_missing_or_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFoundError, match=r"nowhere\.safetensors is not a file"):
        build_teacher(TINY, checkpoint=str(tmp_path / "nowhere.safetensors"))
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(tiny_weights(tmp_path / "whole.safetensors").read_bytes()[:-100])
    with pytest.raises(WeightsNotFoundError, match=r"damaged\.safetensors(.|\n)*SafetensorError"):
        build_teacher(TINY, checkpoint=str(damaged))


IMPORTS = """
import sys
from teachercache.cache_builder.teachers import build_teacher
build_teacher("test_vit", pretrained=False, image_size=64)
print(*{"ray", "zarr", "webdataset"} & set(sys.modules))
"""


def test_teachers_need_neither_ray_nor_zarr_nor_webdataset() -> None:
    run = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


OFFLINE = """
import time
from teachercache.cache_builder.teachers import build_teacher
from teachercache.pipeline.errors import WeightsNotFoundError
start = time.monotonic()
try:
    build_teacher("dinov2_small")
except WeightsNotFoundError as error:
    print(f"{time.monotonic() - start:.1f} s", error)
"""


@pytest.mark.parametrize("setting", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_without_the_hub_the_error_says_how_to_pass_a_file(setting: dict[str, str], tmp_path: Path) -> None:
    environment = os.environ | {"HF_HOME": str(tmp_path)} | setting
    run = subprocess.run(
        [sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True, check=True
    )
    assert "teachers.<name>.checkpoint=" in run.stdout
    assert "teachers.<name>.pretrained=false" in run.stdout
    assert float(run.stdout.split()[0]) < 20


def test_the_weights_hash_depends_on_every_bit_and_on_nothing_else() -> None:
    module = nn.Conv2d(3, 8, 3)
    first = weights_hash(module)
    assert weights_hash(module.to(memory_format=torch.channels_last)) == first
    assert weights_hash(module.bfloat16()) != first
    module.float()
    with torch.no_grad():
        module.bias[0] = torch.nextafter(module.bias[0], torch.tensor(9.0))  # type: ignore[index]
    assert weights_hash(module) != first


def test_the_spec_of_a_teacher_carries_its_hash_and_refuses_others() -> None:
    first = build_teacher(TINY, pretrained=False, image_size=64)
    second = build_teacher(first.spec)
    assert first.spec.weights_hash == first.weights_hash == second.weights_hash
    assert (
        build_teacher(TINY, pretrained=False, image_size=64, random_seed=1).weights_hash != first.weights_hash
    )
    with pytest.raises(CacheMismatchError, match=first.weights_hash):
        build_teacher(first.spec.model_copy(update={"random_seed": 1}))


@pytest.mark.parametrize(
    ("name", "gmacs"), [("dinov2_large", 221), ("openclip_large", 221), ("sam_large", 1308)]
)
def test_gmacs_are_those_of_the_paper(name: str, gmacs: float) -> None:
    spec = resolve_teacher(name, TeacherRecipe(), (384, 384))
    assert teacher_gmacs(spec) == pytest.approx(gmacs, rel=0.01)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_gmacs_agree_with_fvcore() -> None:
    from fvcore.nn import FlopCountAnalysis

    teacher = small_teacher("dinov2_small")

    class Blocks(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            maps: list[Tensor] = teacher.model.forward_intermediates(x, intermediates_only=True)  # type: ignore[operator, union-attr]
            return maps

    counted = FlopCountAnalysis(Blocks(), torch.zeros(1, 3, 98, 98)).unsupported_ops_warnings(False)
    assert teacher_gmacs(teacher.spec) == pytest.approx(counted.total() / 1e9, rel=0.01)


if __name__ == "__main__":
    GOLDENS.parent.mkdir(exist_ok=True)
    GOLDENS.write_text(json.dumps({name: golden(name) for name in SMALL}, indent=1) + "\n", "utf-8")
