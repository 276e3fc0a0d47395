"""GroundingDINO's image side as a teacher, held to transformers' own whole model in small."""

# ruff: noqa: F811  fixtures of another module
from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GroundingDinoConfig

from teachercache import build
from teachercache.cache_builder.against_teacher import compare_with_teachers
from teachercache.cache_builder.builder import prepare
from teachercache.cache_builder.teachers import (
    Teacher,
    TeacherRecipe,
    build_teacher,
    resolve_teacher,
)
from teachercache.cache_builder.teachers import grounding_dino as module
from teachercache.cache_builder.teachers.registry import presets, teacher_gmacs
from teachercache.cache_builder.teachers.teacher_recipe import build_teachers
from teachercache.pipeline.errors import MissingExtraError, TeacherInputError, WeightsNotFoundError
from teachercache.pipeline.verify import verify
from tests.make_cache import build_recipe, make_images
from tests.tiny_grounding_dino import TINY, folder, tiny_grounding_dino, tiny_model, whole  # noqa: F401

STRIDES = (8, 16, 32, 64)
STAGES = "model.backbone.conv_encoder.model.swin.encoder.layers"
REAL = ["grounding_dino_tiny", "grounding_dino_base"]


def pixels(size: tuple[int, int]) -> Tensor:
    values = torch.arange(2 * 3 * size[0] * size[1]).view(2, 3, *size)
    return ((values * 7919 + values // 97) % 256).to(torch.uint8)


def tiny(index: int = 1, size: int = 64, **keys: Any) -> Teacher:
    return build_teacher(TINY, block_indices=(index,), image_size=size, **({"pretrained": False} | keys))


def encoder_input(whole: Any, images: Tensor) -> list[Tensor]:
    """The maps (B, H, W, C) that the encoder is given in a complete forward pass, with text."""
    given: dict[str, Any] = {}
    handle = whole.model.encoder.register_forward_pre_hook(
        lambda _, __, keys: given.update(keys), with_kwargs=True
    )
    try:
        with torch.no_grad():
            whole(pixel_values=images, input_ids=torch.tensor([[101, 1037, 1012, 102]] * len(images)))
    finally:
        handle.remove()
    grids = given["spatial_shapes_list"]
    flat = given["vision_features"].split([height * width for height, width in grids], dim=1)
    return [tokens.unflatten(1, tuple(grid)) for tokens, grid in zip(flat, grids, strict=True)]


@pytest.mark.parametrize("size", [(64, 96), (96, 160)])  # the second one is no multiple of 64
def test_the_features_are_what_the_encoder_takes(whole: Any, folder: Path, size: tuple[int, int]) -> None:
    views = pixels(size)
    for index, expected in enumerate(encoder_input(whole, normalised(views))):
        recipe = TeacherRecipe(model=TINY, checkpoint=str(folder), block_indices=(index,))
        teacher = build_teacher(resolve_teacher("t", recipe, size))
        features = teacher(views)
        maps = features.feature_maps_BSHWC
        torch.testing.assert_close(maps[:, 0], expected, rtol=1e-6, atol=1e-6)
        grid = tuple(-(-side // STRIDES[index]) for side in size)
        assert maps.shape == (2, 1, *teacher.spec.native_grid, 256) == (2, 1, *grid, 256)
        assert maps.is_contiguous()
        assert features.cls_token_BSC is features.global_feature_BD is None


def normalised(views: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (views / 255 - mean) / std


def test_nothing_but_the_image_side_is_made_or_needed(folder: Path, tmp_path: Path) -> None:
    teacher = tiny(checkpoint=str(folder), pretrained=True)
    parts = {name.split(".")[1] for name, _ in teacher.named_parameters()}
    assert parts == {"backbone", "input_proj_vision"}
    state = load_file(folder / "model.safetensors")
    image_side = {k: v for k, v in state.items() if k.startswith(("model.backbone.", "model.input_proj_"))}
    assert len(image_side) < len(state)
    alone = save(image_side, tmp_path / "image_side.safetensors")
    assert tiny(checkpoint=alone, pretrained=True).weights_hash == teacher.weights_hash


def test_older_files_have_the_same_weights(folder: Path, tmp_path: Path) -> None:
    """When the published files were made, Swin's backbone had no norm of its own, and saved its indices."""
    state = load_file(folder / "model.safetensors")
    swin = "model.backbone.conv_encoder.model"
    norms = {key for key in state if key.startswith(swin) and ".layernorm." in key}
    assert len(norms) == 2
    older = {key: tensor for key, tensor in state.items() if key not in norms}
    older[f"{swin}.encoder.layers.0.blocks.0.attention.self.relative_position_index"] = torch.zeros(
        16, 16, dtype=torch.int64
    )
    path = save(older, tmp_path / "older.safetensors")
    expected = tiny(checkpoint=str(folder), pretrained=True).weights_hash
    assert tiny(checkpoint=path, pretrained=True).weights_hash == expected


def test_what_lies_behind_the_map_is_left_out() -> None:
    stages = [len(list(tiny(index).get_submodule(STAGES).children())) for index in range(4)]
    assert stages == [2, 3, 4, 4]


def save(state: dict[str, Tensor], path: Path) -> str:
    save_file(state, path)
    return str(path)


def test_random_weights_are_those_of_the_seed() -> None:
    before = torch.get_rng_state()
    with ThreadPoolExecutor(4) as pool:
        hashes = {teacher.weights_hash for teacher in pool.map(lambda _: tiny(), range(8))}
    assert len(hashes) == 1
    assert torch.equal(torch.get_rng_state(), before)
    assert tiny(random_seed=1).weights_hash not in hashes
    views = pixels((64, 64))
    assert torch.equal(tiny()(views).feature_maps_BSHWC, tiny()(views).feature_maps_BSHWC)


def test_a_file_and_its_folder_are_one_checkpoint(folder: Path) -> None:
    first, second = (
        tiny(checkpoint=str(path), pretrained=True) for path in (folder, folder / "model.safetensors")
    )
    assert first.weights_hash == second.weights_hash != tiny().weights_hash
    assert not any(parameter.requires_grad for parameter in first.parameters())
    assert not first.model.training  # type: ignore[union-attr]


def test_pretrained_weights_come_from_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, name: str) -> str:
        asked.append(f"{repository}/{name}")
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    teacher = tiny(pretrained=True)
    assert set(asked) == {f"IDEA-Research/{TINY}/model.safetensors"}
    assert teacher.weights_hash == tiny(checkpoint=str(folder), pretrained=True).weights_hash


def test_every_key_must_be_there_known_and_in_shape(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / "model.safetensors")
    lost = "model.input_proj_vision.0.0.weight"
    for change, message in (
        ({lost: None}, r"missing input_proj_vision\.0\.0\.weight"),
        ({"model.backbone.stray": torch.zeros(1)}, r"unexpected backbone\.stray"),
        ({lost: torch.zeros(256, 17, 1, 1)}, r"misshapen input_proj_vision\.0\.0\.weight"),
    ):
        changed = {key: tensor for key, tensor in (state | change).items() if tensor is not None}
        path = save(changed, tmp_path / "changed.safetensors")
        with pytest.raises(WeightsNotFoundError, match=rf"1 keys that differ: {message}"):
            tiny(checkpoint=path, pretrained=True)


def test_a_checkpoint_that_is_no_safetensors_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFoundError, match=r"nowhere\.safetensors is not a file"):
        tiny(checkpoint=str(tmp_path / "nowhere.safetensors"), pretrained=True)
    with pytest.raises(WeightsNotFoundError, match=r"model\.safetensors is not a file"):
        tiny(checkpoint=str(tmp_path), pretrained=True)
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pickled.pth")
    with pytest.raises(WeightsNotFoundError, match="SafetensorError"):
        tiny(checkpoint=str(tmp_path / "pickled.pth"), pretrained=True)


def test_without_the_hub_the_error_says_how_to_pass_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    with pytest.raises(WeightsNotFoundError, match=r"no route(.|\n)*teachers\.<name>\.checkpoint="):
        tiny(pretrained=True)


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'teachercache\[grounding-dino\]'"):
        resolve_teacher("grounding_dino_tiny", TeacherRecipe(), (384, 384))
    assert resolve_teacher("dinov2_small", TeacherRecipe(), (98, 98)).width == 384


IMPORTS = """
import sys
import teachercache.cache_builder.builder, teachercache.pipeline.verify
import teachercache.jobs.inspection.report, teachercache.student.training.train
from teachercache.cache_builder.teachers import TeacherRecipe, resolve_teacher
resolve_teacher("dinov2_small", TeacherRecipe(), (98, 98))
print(*{"transformers", "tokenizers"} & set(sys.modules))
"""


def test_who_has_no_such_teacher_does_not_import_transformers() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", IMPORTS], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == []


def test_a_cache_is_built_and_holds_the_live_features(tmp_path: Path) -> None:
    keys = {"model": TINY, "pretrained": False}
    teachers = {
        "fine": keys | {"block_indices": [0], "codec": "f32"},
        "coarse": keys | {"block_indices": [1], "grid": "adjoint", "grid_size": [2, 2]},
    }
    images = make_images(tmp_path / "images", 4)
    views = {"num_views": 2, "size": [64, 64]}
    cache = build(
        build_recipe(tmp_path / "cache", images, teachers=teachers, views=views), Console(quiet=True)
    ).cache
    assert [spec.native_grid for spec in cache.spec.teachers.values()] == [(8, 8), (4, 4)]
    assert "transformers" in cache.spec.versions
    assert verify(cache, full=True) == []
    comparisons = compare_with_teachers(cache, 8, seed=0)
    assert {comparison.teacher for comparison in comparisons} == {"fine", "coarse"}
    assert all(comparison.kept for comparison in comparisons)


def test_gmacs_are_those_of_the_layers() -> None:
    """12 N C² in a block of N tokens, 2 N C² where patches merge, up to the projection of the third stage."""
    tokens, width = 16 * 16, 8
    macs = tokens * 3 * 4 * 4 * width
    for stage, depth in enumerate((1, 1, 2)):
        macs += 12 * depth * tokens * width**2
        if stage < 2:
            macs += 2 * tokens * width**2
            tokens, width = tokens // 4, 2 * width
    macs += tokens * width * 256
    assert teacher_gmacs(tiny().spec) == pytest.approx(macs / 1e9)


@pytest.mark.parametrize("name", REAL)
def test_the_presets_give_the_map_on_a_students_grid(name: str) -> None:
    spec = resolve_teacher(name, TeacherRecipe(), (384, 384))
    assert spec.model == presets()[name].model == name.replace("_", "-")
    assert (spec.block_indices, spec.width, spec.native_grid) == ((1,), 256, (50, 50))
    assert (spec.mean, spec.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert resolve_teacher("t", TeacherRecipe(model=spec.model), (384, 384)) == spec
    grids = [
        resolve_teacher(name, TeacherRecipe(block_indices=(index,)), (384, 384)).native_grid
        for index in range(4)
    ]
    assert grids == [(100, 100), (50, 50), (25, 25), (13, 13)]


@pytest.mark.parametrize(
    ("view_size", "image_size"),
    [
        ((384, 384), (800, 800)),
        ((512, 512), (800, 800)),
        ((448, 576), (800, 1024)),
        ((400, 1000), (544, 1344)),
    ],
)
def test_views_are_rendered_at_the_size_of_its_processor(
    view_size: tuple[int, int], image_size: tuple[int, int]
) -> None:
    spec = resolve_teacher("grounding_dino_tiny", TeacherRecipe(), view_size)
    assert spec.image_size == spec.render_size == image_size


def test_sak_compat_feeds_a_square() -> None:
    spec = resolve_teacher("grounding_dino_tiny", TeacherRecipe(), (448, 576), sak_compat=True)
    assert (spec.render_size, spec.image_size) == ((448, 576), (800, 800))


# Facts of the published files: depths, stage widths, (2·window - 1)² × heads of the first stage's biases.
@pytest.mark.parametrize(
    ("model", "depths", "widths", "bias_table"),
    [
        ("grounding-dino-tiny", [2, 2, 6, 2], (192, 384, 768), (169, 3)),
        ("grounding-dino-base", [2, 2, 18, 2], (256, 512, 1024), (529, 4)),
    ],
)
def test_the_models_have_the_published_shapes(
    model: str, depths: list[int], widths: tuple[int, ...], bias_table: tuple[int, int]
) -> None:
    with torch.device("meta"):
        image_side = module._image_side()(module._config(model))
    shapes = {name: tuple(tensor.shape) for name, tensor in image_side.state_dict().items()}
    kernels = [shapes[f"input_proj_vision.{index}.0.weight"] for index in range(4)]
    assert kernels == [*((256, width, 1, 1) for width in widths), (256, widths[-1], 3, 3)]
    swin = image_side.backbone.conv_encoder.model.swin
    assert [len(stage.blocks) for stage in swin.encoder.layers] == depths
    block = "backbone.conv_encoder.model.swin.encoder.layers.0.blocks.0"
    assert shapes[f"{block}.attention.relative_position_bias.relative_position_bias_table"] == bias_table


def test_the_tiny_model_is_the_one_that_transformers_builds_by_default() -> None:
    ours, default = module._config("grounding-dino-tiny"), GroundingDinoConfig()
    assert ours.backbone_config.to_dict() == default.backbone_config.to_dict()
    assert ours.d_model == default.d_model == 256


def test_levels_of_several_grids_are_refused() -> None:
    with pytest.raises(TeacherInputError, match="0: width 256, grid 100×100; 1: width 256, grid 50×50"):
        resolve_teacher("grounding_dino_tiny", TeacherRecipe(block_indices=(0, 1)), (384, 384))
    with pytest.raises(TeacherInputError, match=r"multiples of 32×32(.|\n)*\[384, 384\]"):
        resolve_teacher("grounding_dino_tiny", TeacherRecipe(image_size=378), (384, 384))


@pytest.mark.parametrize("key", ["cls_token", "global_feature"])
def test_there_is_no_feature_of_the_whole_image(key: str) -> None:
    with pytest.raises(TeacherInputError, match=f"no {key}"):
        resolve_teacher("grounding_dino_tiny", TeacherRecipe.model_validate({key: True}), (384, 384))


def test_bfloat16_is_near_float32() -> None:
    views = pixels((64, 64))
    exact = tiny()(views).feature_maps_BSHWC
    rounded = tiny(precision="bfloat16")(views).feature_maps_BSHWC.float()
    assert not torch.equal(rounded, exact)
    assert F.cosine_similarity(rounded, exact, dim=-1).min() > 0.999


def test_a_loss_can_be_taken_against_the_features() -> None:
    target = tiny()(pixels((64, 64))).feature_maps_BSHWC
    student = torch.ones_like(target, requires_grad=True)
    (student * target).sum().backward()
    assert torch.equal(student.grad, target)  # type: ignore[arg-type]


def test_the_stages_of_swin_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = nn.Module.compile  # without a code generator, which takes minutes on a CPU
    monkeypatch.setattr(
        nn.Module, "compile", lambda stage, **how: compiler(stage, backend="eager", fullgraph=True, **how)
    )
    plain, compiled = tiny(0), tiny(0)
    compiled.compile_blocks(batch_size=2)
    stages = [name for name, part in compiled.named_modules() if part._compiled_call_impl is not None]
    assert stages == [f"{STAGES}.0", f"{STAGES}.1"]
    tokens = torch.randn(2, 16 * 16, 8)
    with torch.inference_mode():
        expected, actual = (
            teacher.get_submodule(stages[0])(tokens, (16, 16), always_partition=True)[0]
            for teacher in (plain, compiled)
        )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_teachers_of_one_detector_cost_one_pass_and_are_what_they_are_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five views in batches of two, and one of them as precise as no other."""
    detector = {"model": TINY, "checkpoint": str(folder), "image_size": 64, "codec": "f32"}
    teachers = {f"stride{stride}": detector | {"block_indices": [i]} for i, stride in enumerate(STRIDES)}
    teachers["rough"] = detector | {"block_indices": [1], "precision": "bfloat16"}
    images, views = make_images(tmp_path / "images", 5), {"num_views": 1, "size": [64, 64]}
    recipe = build_recipe(
        tmp_path / "cache", images, teachers=teachers, views=views, rows_per_shard=5, runner={"batch_size": 2}
    )
    own, passes = module.GroundingDinoTeacher.features, list[tuple[int, list[int]]]()

    def counted(self: Any, pixels_B3HW: Tensor, specs: Any) -> Any:
        passes.append((len(pixels_B3HW), [spec.block_indices[0] for spec in specs]))
        return own(self, pixels_B3HW, specs)

    monkeypatch.setattr(module.GroundingDinoTeacher, "features", counted)
    _, _, plan = prepare(recipe, Console(quiet=True))
    assert [one.gmacs > 0 for one in plan.teachers] == [False, False, False, True, True]
    passes.clear()
    cache = build(recipe, Console(quiet=True)).cache
    of_views = [(count, sorted(blocks)) for count, blocks in passes if len(blocks) > 1]
    assert sorted(of_views) == [(1, [0, 1, 2, 3]), (2, [0, 1, 2, 3]), (2, [0, 1, 2, 3])]
    assert [spec.native_grid[0] for spec in cache.spec.teachers.values()] == [8, 4, 2, 1, 4]
    shared = build_teachers(cache.spec.teachers)
    weights = [{id(one) for one in shared[f"stride{stride}"].parameters()} for stride in STRIDES]
    assert set.union(*weights) == weights[-1], "once for all of a pass"
    assert weights[-1].isdisjoint(map(id, shared["rough"].parameters()))
    alone = {name: build_teacher(spec).weights_hash for name, spec in cache.spec.teachers.items()}
    assert {name: one.weights_hash for name, one in shared.items()} == alone
    comparisons = compare_with_teachers(cache, 5, seed=0)
    assert len(comparisons) == 5
    assert all(comparison.kept for comparison in comparisons)
