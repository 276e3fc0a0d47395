"""SAK's student: parameter counts of the paper, Eq. 1–3 against a plain twin, saving and loading."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from teachercache.cache_builder.teachers import resolve_teacher
from teachercache.cache_builder.teachers.teacher_recipe import TeacherRecipe
from teachercache.cache_builder.teachers.timm_teacher import TimmTeacher
from teachercache.pipeline.errors import CheckpointError, RecipeError, WeightsNotFoundError
from teachercache.student.build import build_student, load_student
from teachercache.student.models.stem import Stem, level_depths
from teachercache.student.models.student import Student
from teachercache.student.sak.model import SAK

TEACHERS = ("dinov2", "clip", "sam")
TINY = "vit_tiny_patch16_224"


def tiny(image_size: tuple[int, int] = (64, 96), **teacher_dims: int) -> SAK:
    torch.manual_seed(0)
    student = build_student(
        "sak", stem=TINY, teacher_dims=teacher_dims or {"a": 192, "b": 320}, image_size=image_size
    )
    assert isinstance(student, SAK)
    return student


@pytest.mark.parametrize(
    ("stem", "image_size", "teacher_width", "expected"),
    [
        ("vit_base_patch16_384", (384, 384), 768, (86_088_960, 11_539_047, 18_432, 0)),
        ("vit_base_patch16_384", (512, 512), 768, (86_433_024, 11_539_047, 18_432, 0)),
        ("vit_base_patch16_384", (448, 576), 768, (86_420_736, 11_539_047, 18_432, 0)),
        ("vit_base_patch16_384", (384, 384), 1024, (86_088_960, 11_539_047, 18_432, 9_449_472)),
        ("vit_large_patch16_384", (384, 384), 1024, (303_688_704, 39_417_675, 24_576, 0)),
        ("vit_large_patch16_384", (512, 512), 1024, (304_147_456, 39_417_675, 24_576, 0)),
        ("vit_large_patch16_384", (448, 576), 1024, (304_131_072, 39_417_675, 24_576, 0)),
        ("vit_small_patch16_384", (384, 384), 768, (21_810_816, 2_894_151, 9_216, 3_548_160)),
    ],
)
def test_parameter_counts_are_the_reference_s(
    stem: str, image_size: tuple[int, int], teacher_width: int, expected: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        dims = dict.fromkeys(TEACHERS, teacher_width)
        student = build_student("sak", stem=stem, teacher_dims=dims, image_size=image_size)
    parts = student.parameters_by_part()
    assert tuple(parts[name] for name in ("stem", "adapter paths", "output norms", "aligners")) == expected
    assert sum(parts.values()) == sum(parameter.numel() for parameter in student.parameters())


@pytest.mark.parametrize(
    ("width", "name", "total"), [(768, "base", 97_646_439), (1024, "large", 343_130_955)]
)
def test_totals_of_stage_1(width: int, name: str, total: int) -> None:
    with torch.device("meta"):
        student = build_student(
            "sak",
            stem=f"vit_{name}_patch16_384",
            teacher_dims=dict.fromkeys(TEACHERS, width),
            image_size=(384, 384),
        )
    assert sum(student.parameters_by_part().values()) == total


def by_hand(student: SAK, teacher: str, pixels_B3HW: Tensor) -> list[Tensor]:
    """Eq. 1–3, written as the paper writes them, on the modules of timm."""
    vit, path = student.stem.vit, student.paths[teacher]

    def adapter(index: int, r_in: Tensor) -> Tensor:
        a = path.adapters[index]
        hidden = r_in @ a.down.weight.T + a.down.bias
        r_out: Tensor = a.scale * (nn.functional.gelu(hidden) @ a.up.weight.T + a.up.bias) + r_in
        return r_out

    z = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(pixels_B3HW))))
    r = adapter(0, z)
    maps = []
    for block in range(1, 13):
        z = vit.blocks[block - 1](z)
        r = adapter(block, r + z)
        if block in (3, 6, 9, 12):
            level = block // 3 - 1
            tokens = path.output_norms[level](r[:, 1:])
            if path.aligners:
                tokens = path.aligners[level](tokens)
            maps.append(tokens.transpose(1, 2).reshape(len(pixels_B3HW), -1, *student.stem.grid))
    return maps


def test_forward_equals_the_equations() -> None:
    student = tiny().double()
    for path in student.paths.values():  # values that no initialisation hides
        for adapter in path.adapters:
            nn.init.normal_(adapter.scale)
            nn.init.normal_(adapter.up.bias)
    pixels_B3HW = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    output = student(pixels_B3HW)
    assert list(output) == ["a", "b"]
    for teacher, width in (("a", 192), ("b", 320)):
        expected = by_hand(student, teacher, pixels_B3HW)
        assert [tuple(level.shape) for level in output[teacher]] == [(2, width, 4, 6)] * 4
        for got, wanted in zip(output[teacher], expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_representations_are_the_stem_s_tokens_and_the_paths_before_their_aligners() -> None:
    student = tiny()
    pixels_B3HW = torch.randn(1, 3, 64, 96)
    representations = student.representations(pixels_B3HW)
    expected = student.stem.vit.forward_intermediates(
        pixels_B3HW, indices=[2, 5, 8, 11], output_fmt="NLC", intermediates_only=True
    )
    for got, wanted in zip(representations[0], expected, strict=True):
        torch.testing.assert_close(got, wanted)
    assert {tokens.shape for tokens in representations[student.experts.index("b")]} == {(1, 24, 192)}


def test_every_parameter_is_trained() -> None:
    student = tiny()
    output = student(torch.randn(2, 3, 64, 96))
    sum(level.square().mean() for levels in output.values() for level in levels).backward()
    assert [name for name, p in student.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("stem", ["vit_small_patch16_dinov3", "eva02_tiny_patch14_224"])
def test_stems_with_registers_and_rotary_positions(stem: str) -> None:
    patch = 14 if "14" in stem else 16
    student = build_student("sak", stem=stem, teacher_dims={"a": 8}, image_size=(4 * patch, 3 * patch))
    pixels_B3HW = torch.randn(1, 3, 4 * patch, 3 * patch)
    assert [tuple(level.shape) for level in student(pixels_B3HW)["a"]] == [(1, 8, 4, 3)] * 4
    assert isinstance(student, SAK)
    tokens_BND = student.stem(pixels_B3HW)
    assert len(tokens_BND) == 13
    expected = student.stem.vit.forward_intermediates(pixels_B3HW, output_fmt="NLC", intermediates_only=True)
    for got, wanted in zip(tokens_BND[1:], expected, strict=True):
        torch.testing.assert_close(got[:, student.stem.num_prefix_tokens :], wanted)


def test_an_image_that_patches_do_not_fill_is_resampled_to_the_nearest_that_they_do() -> None:
    student = build_student("sak", stem="test_vit", teacher_dims={"a": 8}, image_size=(60, 84))
    assert isinstance(student, SAK)
    assert student.stem.grid == (4, 5)
    pixels_B3HW = torch.rand(2, 3, 60, 84)
    resampled_B3HW = nn.functional.interpolate(pixels_B3HW, (64, 80), mode="bilinear", antialias=True)
    expected = student.stem.vit.forward_intermediates(
        resampled_B3HW, output_fmt="NLC", intermediates_only=True
    )
    tokens_BND = student.stem(pixels_B3HW)
    torch.testing.assert_close(tokens_BND[-1][:, student.stem.num_prefix_tokens :], expected[-1])
    with pytest.raises(ValueError, match=r"got: .*\(2, 3, 64, 80\)\n.*expected: \(B, 3, 60, 84\)"):
        student(resampled_B3HW)


def test_sams_encoder_is_a_stem_at_any_size() -> None:
    with torch.device("meta"):  # 12 blocks, windows and relative positions
        student = build_student(
            "sak", stem="samvit_base_patch16", teacher_dims={"a": 8}, image_size=(512, 512)
        )
        assert isinstance(student, SAK)
        maps = student(torch.empty(1, 3, 512, 512))["a"]
    assert [tuple(level.shape) for level in maps] == [(1, 8, 32, 32)] * 4
    torch.manual_seed(0)
    student = build_student("sak", stem="samvit_base_patch16_224", teacher_dims={"a": 8}, image_size=(64, 96))
    assert isinstance(student, SAK)
    pixels_B3HW = torch.rand(2, 3, 64, 96)
    expected = student.stem.vit.forward_intermediates(pixels_B3HW, intermediates_only=True)
    for block, wanted_BDhw in enumerate(expected, start=1):
        got_BnD = student.stem(pixels_B3HW)[block]
        torch.testing.assert_close(got_BnD, wanted_BDhw.flatten(2).transpose(1, 2))
    student.stem.resize((32, 48))
    assert [tuple(level.shape) for level in student(pixels_B3HW[..., :32, :48])["a"]] == [(2, 8, 2, 3)] * 4


def test_weights_that_cannot_be_had_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsNotFoundError, match="HF_HOME"):
        build_student("sak", stem=TINY, teacher_dims={"a": 192}, image_size=(64, 64), pretrained=True)


def test_levels_are_four_even_steps() -> None:
    assert level_depths(12) == [3, 6, 9, 12]
    assert level_depths(24) == [6, 12, 18, 24]
    assert level_depths(27) == [7, 14, 21, 27]


@pytest.mark.parametrize(
    "images",
    [
        torch.rand(2, 3, 8, 8),
        torch.zeros(2, 4, 8, 8, dtype=torch.uint8),
        torch.zeros(8, 8, dtype=torch.uint8),
    ],
)
def test_normalize_takes_rgb_bytes_alone(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"Images must be RGB(.|\n)*of shape \(B, 3, H, W\)"):
        tiny(a=8).normalize(images)


def test_normalize_uses_the_statistics_of_the_stem() -> None:
    student = tiny()
    images_B3HW = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    config = timm.get_pretrained_cfg(TINY)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (config.mean, config.std))
    torch.testing.assert_close(student.normalize(images_B3HW), (images_B3HW / 255 - mean) / std)


def test_sak_compat_feeds_the_stem_as_the_teacher_of_its_name() -> None:
    """By ImageNet's statistics, without the pixels that fill no patch: 104 is 7 patches of 14 and 6 more."""
    name, size = "vit_small_patch14_dinov2", (104, 90)
    recipe = TeacherRecipe(model=name, pretrained=False)
    teacher = TimmTeacher(resolve_teacher("t", recipe, size, sak_compat=True))
    student = SAK(name, {"t": 384}, size, sak_compat=True).eval()
    assert student.stem.grid == (7, 6)
    student.stem.vit.load_state_dict(teacher.model.state_dict(), strict=False)
    images_B3HW = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
    expected_SnC = teacher(images_B3HW).feature_maps_BSHWC[0].flatten(1, 2)
    with torch.no_grad():
        levels = student.representations(student.normalize(images_B3HW))[0]
    torch.testing.assert_close(torch.cat(levels), expected_SnC)


def test_sak_compat_shows_sam_1024_pixels() -> None:
    with torch.device("meta"):
        stem = Stem("samvit_base_patch16", (448, 576), sak_compat=True)
        tokens_BND = stem(torch.empty(1, 3, 448, 576))[-1]
    assert stem.grid == (64, 64)
    assert tokens_BND.shape == (1, 64 * 64, 768)
    assert (stem.mean, stem.std) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    stem.resize((512, 512))
    assert stem.grid == (64, 64)


def test_sak_compat_is_kept_in_the_config(tmp_path: Path) -> None:
    """ImageNet's statistics, where timm has .5 and .5 for ViTs; configs from before the key stay readable."""
    student = SAK(TINY, {"a": 192}, (64, 96), sak_compat=True)
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["sak_compat"] is True
    torch.testing.assert_close(student.mean.flatten(), torch.tensor(IMAGENET_DEFAULT_MEAN))
    assert torch.equal(SAK.from_pretrained(tmp_path).std, student.std)
    tiny().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["sak_compat"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert SAK.from_pretrained(tmp_path).mean.flatten().tolist() == [0.5] * 3


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[SAK, Path]:
    folder = tmp_path_factory.mktemp("student")
    student = tiny().eval()
    student.mean += 0.25  # a normalisation that this timm would not give
    student.save_pretrained(folder)
    return student, folder


def test_a_saved_student_is_the_same_student(saved: tuple[SAK, Path]) -> None:
    student, folder = saved
    loaded = load_student(folder)
    assert not loaded.training
    images_B3HW = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    expected, got = (s(s.normalize(images_B3HW)) for s in (student, loaded))
    for teacher in ("a", "b"):
        for one, other in zip(expected[teacher], got[teacher], strict=True):
            assert torch.equal(one, other)


def test_a_saved_student_needs_neither_cache_nor_ray(saved: tuple[SAK, Path]) -> None:
    code = (
        "import sys; from teachercache import load_student; load_student(sys.argv[1])\n"
        "loaded = {name.removeprefix('teachercache.').split('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'ray', 'zarr', 'webdataset', 'cache_builder'}, loaded"
    )
    subprocess.run([sys.executable, "-c", code, saved[1]], check=True)


def damage(folder: Path, what: str) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    match what:
        case "no weights":
            weights.unlink()
        case "cut weights":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "missing key":
            tensors = load_file(weights)
            tensors.pop("stem.vit.cls_token")
            save_file(tensors, weights)
        case "no config":
            config.unlink()
        case "not JSON":
            config.write_text("{")
        case "unknown argument":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"colour": "red"}))


@pytest.mark.parametrize(
    "what", ["no weights", "cut weights", "missing key", "no config", "not JSON", "unknown argument"]
)
def test_a_damaged_student_is_an_error(saved: tuple[SAK, Path], tmp_path: Path, what: str) -> None:
    folder = shutil.copytree(saved[1], tmp_path / "copy")
    damage(folder, what)
    with pytest.raises(CheckpointError, match=str(folder)):
        SAK.from_pretrained(folder)


def test_a_student_of_another_kind_is_an_error(saved: tuple[SAK, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved[1], tmp_path / "copy")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"sak"', '"soup"'))
    with pytest.raises(CheckpointError, match="another kind"):
        SAK.from_pretrained(folder)
    with pytest.raises(RecipeError, match="soup"):
        load_student(folder)


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such student"):
        load_student(tmp_path / "nowhere")


def wrong(**changes: object) -> Student:
    arguments = {"stem": TINY, "teacher_dims": {"a": 192}, "image_size": (64, 64)} | changes
    return build_student(str(arguments.pop("kind", "sak")), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "sac"}, "did you mean sak"),
        ({"stem": "vit_tiny_patch16_225"}, "did you mean .*vit_tiny_patch16_224"),
        ({"stem": "resnet18"}, "cannot be a stem"),
        ({"stem": "swin_tiny_patch4_window7_224", "image_size": (224, 224)}, "cannot be a stem"),
        ({"teacher_dims": {}}, "needs a teacher"),
        ({"teacher_dims": {"a.b": 192}}, "letters, digits"),
        ({"teacher_dims": {"train": 192}}, "name of a part"),
    ],
)
def test_what_cannot_be_built_says_why(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        wrong(**changes)


@pytest.mark.parametrize("stem", [TINY, "samvit_base_patch16_224"])
def test_a_stem_is_one_graph_however_often_it_runs(stem: str) -> None:
    graphs = []

    def note(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    module = Stem(stem, (32, 32)).eval()
    compiled = torch.compile(module, backend=note, dynamic=False)
    with torch.no_grad():
        for pixels_B3HW in torch.randn(12, 2, 3, 32, 32).unbind():
            for got, expected in zip(compiled(pixels_B3HW), module(pixels_B3HW), strict=True):
                torch.testing.assert_close(got, expected)
    assert len(graphs) == 1


def test_a_copy_of_a_stem_notes_its_own_tokens() -> None:
    module = Stem(TINY, (32, 32)).eval()
    copy = deepcopy(module)
    copy.vit.blocks[0].mlp.fc1.weight.data.zero_()
    pixels_B3HW = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected, got, again = (one(pixels_B3HW)[-1] for one in (module, copy, module))
    assert not torch.equal(got, expected)
    assert torch.equal(again, expected)
