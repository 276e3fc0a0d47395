"""KPU's student: the paper's parameter count, what learns and what stays, Eq. 1 to 4, saving and loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from teachercache.pipeline.errors import RecipeError
from teachercache.pipeline.records.strict import Size
from teachercache.student.build import build_student, load_student
from teachercache.student.kpu.latent_space import Alignment, Features, Projection
from teachercache.student.kpu.model import KPU
from teachercache.student.kpu.vit_adapter import STRIDES, ViTAdapter
from teachercache.student.losses.alignment import AlignmentLoss
from teachercache.student.models.stem import Stem
from teachercache.student.models.student import StudentOutput

IMAGE = (64, 96)
DIMS = {"clip": 8, "sam": 4}
GRIDS: dict[str, Size] = {"clip": (4, 6), "sam": (9, 13)}
BASE_A = {"preservation": False, "unification": False, "reconstruction": False}
BASE_B = {"unification": False, "reconstruction": False}
BASE_C = {"reconstruction": False}
PARTS = ("spatial prior", "injectors", "extractors", "maps")


def tiny(**changes: Any) -> KPU:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"stem": "test_vit", "teacher_dims": DIMS, "image_size": IMAGE}
    arguments |= {"teacher_grids": GRIDS, "class_tokens": ["clip"]}
    student = build_student("kpu", **arguments | changes)
    assert isinstance(student, KPU)
    return student


def moved(student: KPU) -> KPU:
    """With an adapter that does something, and looks at places that depend on what it sees."""
    assert student.vit_adapter is not None
    for name, parameter in student.vit_adapter.named_parameters():
        if name.endswith(("gamma", "offsets.weight", "attention.weights.weight")):
            nn.init.normal_(parameter, std=0.3)
    return student


def teacher_features(dtype: torch.dtype = torch.float32) -> dict[str, Features]:
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, width in DIMS.items():
        image = torch.randn(2, width, generator=generator, dtype=dtype) if name == "clip" else None
        maps = torch.randn(2, width, *GRIDS[name], generator=generator, dtype=dtype)
        found[name] = Features(image, maps)
    return found


def test_the_adapter_has_the_paper_s_13_6_million_parameters() -> None:
    """Beside 86 million of the sentinel, about 100 million in all ("Implementation Details")."""
    with torch.device("meta"):
        student = tiny(
            stem="vit_base_patch14_dinov2.lvd142m",
            teacher_dims={"clip": 768, "sam": 768},
            image_size=(384, 384),
            teacher_grids={"clip": (24, 24), "sam": (64, 64)},
        )
    counts = student.parameters_by_part()
    assert [counts[part] for part in PARTS] == [1_579_328, 3_708_096, 6_024_672, 2_368_512]
    assert sum(counts[part] for part in PARTS) == 13_680_608
    assert (counts["stem"], counts["norm"]) == (86_086_656, 1_536)
    assert [counts[h] for h in ("h_s2t", "h_t2s", "h_rec")] == [3 * (768 * 768 + 768) * 2] * 3
    assert sum(counts.values()) == sum(parameter.numel() for parameter in student.parameters())
    learning = sum(p.numel() for n, p in student.named_parameters() if p.requires_grad and "vit_adapter" in n)
    assert learning == 11_267_552  # no teacher reads strides 4 and 32, whose own layers are left alone


def test_what_the_sentinel_is_learns_nothing_and_all_else_does() -> None:
    student = moved(tiny())
    loss, _ = AlignmentLoss()(student(torch.randn(2, 3, *IMAGE), teachers=teacher_features()))
    loss.backward()
    learning = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    gradients = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert gradients == learning
    assert [n for n, p in student.named_parameters() if p.grad is not None and not p.grad.any()] == []
    kept = {name for name, _ in student.named_parameters()} - learning
    assert student.scales == [1, 2]
    assert {name for name in kept if not name.startswith("stem.")} == {
        f"vit_adapter.{part}.{kind}"
        for part in ("up", "norms.0", "norms.3", "prior.projections.0")
        for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("stem", ["test_vit", "eva02_tiny_patch14_224", "vit_tiny_patch16_224"])
def test_a_new_adapter_leaves_the_sentinel_s_tokens_as_they_are_to_the_bit(stem: str) -> None:
    """Of rotary positions and patches that do not fill the image too."""
    student = tiny(stem=stem)
    pixels_B3HW = torch.randn(2, 3, *IMAGE)
    with torch.no_grad():
        expected = student.stem(pixels_B3HW)[-1]
        assert student.vit_adapter is not None
        assert torch.equal(student.vit_adapter(student.stem, pixels_B3HW, [])[0], expected)
        moved(student)
        assert not torch.equal(student.vit_adapter(student.stem, pixels_B3HW, [])[0], expected)


def test_sams_encoder_can_be_the_sentinel() -> None:
    """Its blocks see maps (B, h, w, D), and it has no class token: x is the mean of its patch tokens."""
    with torch.device("meta"):
        student = tiny(stem="samvit_base_patch16", image_size=(512, 512))
        image_BD, maps_BDhw = student.features(torch.empty(1, 3, 512, 512))
    assert not student.stem.has_class_token
    assert image_BD.shape == (1, 768)
    assert [tuple(map_BDhw.shape[1:]) for map_BDhw in maps_BDhw] == [(768, n, n) for n in (128, 64, 32, 16)]


@pytest.mark.parametrize("size", [(64, 96), (60, 84), (70, 42)])
def test_v_has_four_scales_whatever_the_patch_and_the_size(size: Size) -> None:
    student = tiny(stem="eva02_tiny_patch14_224", image_size=size)
    image_BD, maps_BDhw = student.features(torch.randn(1, 3, *size))
    assert image_BD.shape == (1, 192)
    expected = [tuple(-(-side // stride) for side in size) for stride in STRIDES]
    assert [tuple(map_BDhw.shape[2:]) for map_BDhw in maps_BDhw] == expected


def adapter_by_hand(adapter: ViTAdapter, stem: Stem, pixels_B3HW: Tensor) -> tuple[Tensor, list[Tensor]]:
    """As ViT-Adapter's Figure 4 draws it, on the blocks of timm's plain ViT."""
    vit, (height, width) = stem.vit, stem.grid
    c1, c2, c3, c4 = adapter.prior(pixels_B3HW)
    shapes = tuple((c.shape[2], c.shape[3]) for c in (c2, c3, c4))
    c = torch.cat(
        [
            x.flatten(2).transpose(1, 2) + e
            for x, e in zip((c2, c3, c4), adapter.scale_embedding, strict=True)
        ],
        1,
    )
    z = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(pixels_B3HW))))
    ends, outs = stem.level_depths, []
    for i, (first, last) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        cls, x = z[:, :1], z[:, 1:]
        injector: Any = adapter.injectors[i]
        seen = injector.attention(
            injector.query_norm(x), ((height, width),), injector.feature_norm(c), shapes
        )
        z = torch.cat([cls, x + injector.gamma * seen], dim=1)
        for block in vit.blocks[first:last]:
            z = block(z)
        for extractor in adapter.extractors[i]:
            c = c + extractor.attention(
                extractor.query_norm(c), shapes, extractor.feature_norm(z[:, 1:]), ((height, width),)
            )
            ffn, hidden, start = extractor.ffn, extractor.ffn.enter(extractor.ffn_norm(c)), 0
            parts = []
            for h, w in shapes:
                part = hidden[:, start : start + h * w].transpose(1, 2).reshape(len(c), -1, h, w)
                parts.append(ffn.depthwise(part).flatten(2).transpose(1, 2))
                start += h * w
            c = c + ffn.leave(F.gelu(torch.cat(parts, dim=1)))
        outs.append(z[:, 1:].transpose(1, 2).reshape(len(z), -1, height, width))
    (h2, w2), (h3, w3), (h4, w4) = shapes
    c2, c3, c4 = c.split([h2 * w2, h3 * w3, h4 * w4], dim=1)
    c2, c3, c4 = (
        x.transpose(1, 2).reshape(len(x), -1, h, w) for x, (h, w) in zip((c2, c3, c4), shapes, strict=True)
    )
    pyramid = [adapter.up(c2) + c1, c2, c3, c4]
    scales = (4.0, 2.0, 1.0, 0.5)
    maps = [
        norm(c + F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False))
        for norm, c, x, scale in zip(adapter.norms, pyramid, outs, scales, strict=True)
    ]
    return z, maps


def test_the_adapter_is_that_of_its_paper() -> None:
    student = moved(tiny(stem="vit_tiny_patch16_224")).double()
    assert student.vit_adapter is not None
    pixels_B3HW = torch.randn(2, 3, *IMAGE, dtype=torch.float64)
    with torch.no_grad():
        got_BND, got_BDhw = student.vit_adapter(student.stem, pixels_B3HW, range(4))
        expected_BND, expected_BDhw = adapter_by_hand(student.vit_adapter, student.stem, pixels_B3HW)
    torch.testing.assert_close(got_BND, expected_BND, rtol=1e-10, atol=1e-10)
    for got, expected in zip(got_BDhw, expected_BDhw, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_a_batch_can_be_divided_as_one_likes() -> None:
    """No statistics over images: what two processes make of halves is what one makes of the whole."""
    student = moved(tiny()).train().double()
    pixels_B3HW = torch.randn(3, 3, *IMAGE, dtype=torch.float64)
    with torch.no_grad():
        whole, parts = student(pixels_B3HW), [student(pixels_B3HW[i : i + 1]) for i in range(3)]
    for name in DIMS:
        torch.testing.assert_close(whole[name][0], torch.cat([part[name][0] for part in parts]))
    assert {name for name, _ in student.named_buffers() if not name.startswith("stem.")} == {"mean", "std"}


def test_each_teacher_is_compared_with_the_nearest_scale() -> None:
    grids = {"a": (96, 96), "b": (64, 64), "c": (37, 37), "d": (24, 24), "e": (16, 16), "f": (12, 12)}
    with torch.device("meta"):
        student = tiny(image_size=(384, 384), teacher_dims=dict.fromkeys(grids, 8), teacher_grids=grids)
    assert student._scales == {"a": 0, "b": 1, "c": 1, "d": 2, "e": 3, "f": 3}


def test_a_projection_resamples_first() -> None:
    torch.manual_seed(0)
    projection = Projection(5, 3, hidden=7, with_image=True).double()
    features = Features(*(torch.randn(shape, dtype=torch.float64) for shape in ((2, 5), (2, 5, 2, 3))))
    got = projection(features, (4, 4))

    def mlp(module: nn.Module, tokens: Tensor) -> Tensor:
        first, second = (layer for layer in module.children() if isinstance(layer, nn.Linear))
        hidden = F.gelu(tokens @ first.weight.T + first.bias)
        return hidden @ second.weight.T + second.bias

    resampled = F.interpolate(features.map, (4, 4), mode="bilinear", align_corners=False)
    assert projection.image is not None
    assert features.image is not None
    assert got.image is not None
    torch.testing.assert_close(got.image, mlp(projection.image, features.image))
    torch.testing.assert_close(got.map[1, :, 2, 3], mlp(projection.map, resampled[1, :, 2, 3]))


def align_by_hand(one: Features, other: Features) -> Tensor:
    """Eq. 1, token by token."""
    batch, _, height, width = other.map.shape
    places = [(b, i, j) for b in range(batch) for i in range(height) for j in range(width)]
    cosines = [
        torch.dot(one.map[b, :, i, j], other.map[b, :, i, j])
        / (one.map[b, :, i, j].norm() * other.map[b, :, i, j].norm())
        for b, i, j in places
    ]
    apart = (one.map - other.map).abs()
    smooth = torch.where(apart < 1, apart.square() / 2, apart - 0.5).mean()
    loss = 0.9 * (1 - torch.stack(cosines).mean()) + 0.1 * smooth
    if one.image is not None and other.image is not None:
        images = [
            torch.dot(x, y) / (x.norm() * y.norm()) for x, y in zip(one.image, other.image, strict=True)
        ]
        loss = loss + 1.0 * (1 - torch.stack(images).mean())
    return loss


@pytest.mark.parametrize(
    ("switches", "spaces"), [({}, "s2t t2s rec"), (BASE_C, "s2t t2s"), (BASE_B, "s2t"), (BASE_A, "s2t")]
)
def test_the_loss_is_that_of_the_equations(switches: dict[str, bool], spaces: str) -> None:
    """Of each row of Table 2, with h_s2t, h_t2s and h_rec as the equations compose them."""
    student = tiny(**switches).double()
    pixels_B3HW = torch.randn(2, 3, *IMAGE, dtype=torch.float64)
    teachers = teacher_features(torch.float64)
    total, terms = AlignmentLoss()(student(pixels_B3HW, teachers=teachers))
    image_BD, maps_BDhw = student.features(pixels_B3HW)
    space = student.latent_space
    expected = torch.zeros((), dtype=torch.float64)
    for name, teacher in teachers.items():
        level = {"clip": 2, "sam": 1}[name] if student.vit_adapter else 0
        x = Features(image_BD, maps_BDhw[level])
        pairs = {"s2t": (space["s2t"][name](x, teacher.grid), teacher)}
        if "t2s" in spaces:
            unified = space["t2s"][name](teacher, x.grid)
            pairs["t2s"] = x, unified
        if "rec" in spaces:
            pairs["rec"] = teacher, space["rec"][name](unified, teacher.grid)
        for where, (one, other) in pairs.items():
            loss = align_by_hand(one, other)
            assert terms[f"loss/{name}/{where}"] == pytest.approx(loss.item(), rel=1e-9)
            assert (f"image_cosine/{name}/{where}" in terms) == (name == "clip")
            expected = expected + loss / len(teachers)
    torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-9)
    assert {key.split("/")[2] for key in terms} == set(spaces.split())


def test_the_weights_of_the_loss() -> None:
    teacher = Features(None, torch.tensor([[[[1.0]], [[0.0]]]]))
    student = Features(None, torch.tensor([[[[0.0]], [[2.0]]]]))
    alignment = Alignment(student, teacher, s2t=student, t2s=None, rec=student)
    total, terms = AlignmentLoss(reconstruction_weight=3.0, teacher_weights={"a": 0.5})(
        {"a": alignment, "b": alignment}
    )
    one = 0.9 * 1 + 0.1 * (0.5 + 1.5) / 2
    assert terms["loss/a/s2t"].item() == pytest.approx(one)
    assert total.item() == pytest.approx((0.5 + 1) * (1 + 3) * one / 2)


def test_without_preservation_the_vit_alone_learns() -> None:
    """Base_a: V and x are its last tokens behind a norm."""
    student = tiny(**BASE_A)
    assert student.vit_adapter is None
    assert all(parameter.requires_grad for parameter in student.parameters())
    pixels_B3HW = torch.randn(2, 3, *IMAGE)
    tokens_BND = student.norm(student.stem(pixels_B3HW)[-1])
    image_BD, (map_BDhw,) = student.features(pixels_B3HW)
    torch.testing.assert_close(image_BD, tokens_BND[:, 0])
    torch.testing.assert_close(map_BDhw.flatten(2).transpose(1, 2), tokens_BND[:, 1:])
    loss, _ = AlignmentLoss()(student(pixels_B3HW, teachers=teacher_features()))
    loss.backward()
    assert [name for name, parameter in student.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("switches", [{}, BASE_A, BASE_B, BASE_C])
def test_a_saved_student_is_the_same_student(tmp_path: Path, switches: dict[str, bool]) -> None:
    student = tiny(**switches).eval()
    if student.vit_adapter:
        moved(student)
    student.save_pretrained(tmp_path)
    loaded = load_student(tmp_path)
    assert isinstance(loaded, KPU)
    assert loaded.config == student.config
    images_B3HW = torch.randint(0, 256, (1, 3, *IMAGE), dtype=torch.uint8)
    with torch.no_grad():
        expected, got = (s(s.normalize(images_B3HW)) for s in (student, loaded))
        projected = loaded.project(loaded.normalize(images_B3HW))
        whole = loaded(loaded.normalize(images_B3HW), full=True)
    for name in DIMS:
        (one,), (other,) = expected[name], got[name]
        assert one.shape == (1, DIMS[name], *GRIDS[name])
        assert torch.equal(one, other)
        assert torch.equal(projected[name].map, other)
    assert isinstance(whole, StudentOutput)
    assert projected["clip"].image is not None
    assert projected["clip"].image.shape == (1, 8)
    assert projected["sam"].image is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {"semseg": 3}}, r"got: +the tasks semseg\n(.|\n)*kind sak"),
        ({"teacher_grids": {"clip": (4, 6)}}, "no grid of sam"),
        ({"unification": False}, "reconstruction without unification"),
        ({"teacher_dims": {}}, "needs a teacher"),
        ({"teacher_dims": {"a.b": 8}}, "letters, digits"),
        ({"stem": "resnet18"}, "cannot be a stem"),
    ],
)
def test_what_cannot_be_built_says_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        tiny(**changes)
