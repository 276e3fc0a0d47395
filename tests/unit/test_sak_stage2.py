"""SAK's student of stage 2: the counts of the paper, what it returns, and what may be frozen."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teachercache.pipeline.errors import RecipeError
from teachercache.student.build import build_student, load_student
from teachercache.student.models.student import StudentOutput
from teachercache.student.sak.model import SAK

TEACHERS = ("dinov2", "clip", "sam")
PASCAL = {"semseg": 21, "parts": 7, "saliency": 2, "normals": 3, "boundary": 1}
NYUD = {"semseg": 40, "depth": 1, "normals": 3, "boundary": 1}
TINY = "test_vit"  # 64 wide, 6 blocks


def tiny(**changes: Any) -> SAK:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "stem": TINY,
        "teacher_dims": {"a": 64, "b": 48},
        "image_size": (64, 96),
        "tasks": {"semseg": 5, "depth": 1},
    }
    student = build_student("sak", **arguments | changes)
    assert isinstance(student, SAK)
    return student


def on_meta(name: str, width: int, tasks: dict[str, int], image_size: tuple[int, int], **changes: Any) -> SAK:
    with torch.device("meta"):
        return tiny(
            stem=f"vit_{name}_patch16_384",
            teacher_dims=dict.fromkeys(TEACHERS, width),
            tasks=tasks,
            image_size=image_size,
            **changes,
        )


def trainable(student: nn.Module) -> set[str]:
    return {name for name, parameter in student.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("name", "width", "paths", "norms"),
    [("base", 768, 11_539_047, 18_432), ("large", 1024, 39_417_675, 24_576)],
)
@pytest.mark.parametrize(
    ("tasks", "image_size", "counts"),
    [
        (
            PASCAL,
            (512, 512),
            {
                "base": (86_433_024, 5_982_880, 29_532_706, 133_506_089),
                "large": (304_147_456, 10_598_560, 52_484_130, 406_672_397),
            },
        ),
        (
            NYUD,
            (448, 576),
            {
                "base": (86_420_736, 4_786_304, 23_639_853, 126_404_372),
                "large": (304_131_072, 8_478_848, 42_005_549, 394_057_720),
            },
        ),
    ],
)
def test_parameter_counts_are_the_reference_s(
    name: str,
    width: int,
    paths: int,
    norms: int,
    tasks: dict[str, int],
    image_size: tuple[int, int],
    counts: dict[str, tuple[int, ...]],
) -> None:
    student = on_meta(name, width, tasks, image_size)
    stem, routers, heads, total = counts[name]
    assert student.parameters_by_part() == {
        "stem": stem,
        "adapter paths": paths,
        "output norms": norms,
        "aligners": 0,
        "routers": routers,
        "heads": heads,
    }
    assert sum(parameter.numel() for parameter in student.parameters()) == total


def test_parameters_of_the_baselines() -> None:
    """116M of the multi-task baseline and 36M of "Freeze" (Table 12)."""
    baseline = on_meta("base", 768, PASCAL, (512, 512), fusion="sum", adapter_paths=False)
    parts = baseline.parameters_by_part()
    assert (parts["stem"] + parts["heads"]) / 1e6 == pytest.approx(116, abs=0.5)
    assert parts["aligners"] == 3 * 4 * (768 * 768 + 768)  # also where the widths are equal
    assert parts["adapter paths"] == parts["output norms"] == parts["routers"] == 0
    frozen = on_meta("base", 768, PASCAL, (512, 512))
    frozen.freeze("stem", "paths")
    counts = [p.numel() for p in frozen.parameters() if p.requires_grad]
    assert sum(counts) == 5_982_880 + 29_532_706
    assert round(sum(counts) / 1e6) == 36


@pytest.mark.parametrize(
    ("stem", "multi_task", "single_task"),
    [
        ("vit_base_patch16_384", 116, 462),
        ("vit_base_patch14_dinov2.lvd142m", 116, 462),
        ("vit_base_patch16_clip_384.laion2b_ft_in12k_in1k", 116, 462),
        ("samvit_base_patch16.sa1b", 118, 474),
    ],
)
def test_parameters_of_teachers_that_learn_the_tasks_themselves(
    stem: str, multi_task: int, single_task: int
) -> None:
    """ "MT Full" and "ST Full" of Table 12, in millions; "ST Full" is a model for each task."""

    def count(tasks: dict[str, int]) -> int:
        with torch.device("meta"):
            student = tiny(stem=stem, teacher_dims={}, tasks=tasks, image_size=(512, 512), fusion="sum")
        return sum(parameter.numel() for parameter in student.parameters())

    assert round(count(PASCAL) / 1e6) == multi_task
    assert sum(count({task: width}) for task, width in PASCAL.items()) / 1e6 == pytest.approx(
        single_task, abs=0.5
    )


class LinearPatches(nn.Module):
    """A convolution whose stride is its kernel, as the linear layer on patches that it is.

    fvcore traces, and tracing a convolution on the meta device is what torch cannot do.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias, self.patch = conv.weight, conv.bias, conv.kernel_size

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        rows, columns = self.patch
        patches = x.reshape(batch, channels, height // rows, rows, width // columns, columns)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return nn.functional.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class NoHead(nn.Module):
    def forward(self, levels: list[Tensor]) -> Tensor:
        return levels[0][:, :1]


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("name", "width", "stem", "with_paths", "with_routers"),
    [("base", 768, 87.76, 99.59, 105.74), ("large", 1024, 310.60, 350.96, 361.84)],
)
def test_gmacs_are_those_of_the_paper(
    name: str, width: int, stem: float, with_paths: float, with_routers: float
) -> None:
    """Table 22, counted as the paper counts: by fvcore, at 512×512."""
    from fvcore.nn import FlopCountAnalysis

    student = on_meta(name, width, PASCAL, (512, 512)).eval()
    assert student.decoder is not None
    student.stem.vit.patch_embed.proj = LinearPatches(student.stem.vit.patch_embed.proj)
    for task in PASCAL:
        student.decoder.heads[task] = NoHead()
    counted = FlopCountAnalysis(student, torch.zeros(1, 3, 512, 512, device="meta"))
    macs = counted.unsupported_ops_warnings(False).uncalled_modules_warnings(False).by_module()
    assert macs["stem"] / 1e9 == pytest.approx(stem, rel=0.005)
    assert (macs["stem"] + macs["paths"]) / 1e9 == pytest.approx(with_paths, rel=0.005)
    everything = macs["stem"] + macs["paths"] + macs["decoder.routers"]
    assert everything / 1e9 == pytest.approx(with_routers, rel=0.005)


@pytest.mark.parametrize("fusion", ["mor", "sum", "concat"])
@pytest.mark.parametrize("decoder", ["simple", "upernet"])
def test_predictions_and_all_the_rest_on_request(fusion: str, decoder: str) -> None:
    student = tiny(fusion=fusion, decoder=decoder).eval()
    pixels_B3HW = torch.randn(2, 3, 64, 96)
    predictions = student(pixels_B3HW)
    assert {task: tuple(p.shape) for task, p in predictions.items()} == {
        "semseg": (2, 5, 64, 96),
        "depth": (2, 1, 64, 96),
    }
    output = student(pixels_B3HW, full=True)
    assert isinstance(output, StudentOutput)
    for task, prediction in predictions.items():
        assert torch.equal(output.predictions[task], prediction)
    assert [tuple(m.shape) for m in output.feature_maps["b"]] == [(2, 48, 4, 6)] * 4
    assert student.experts == ["stem", "a", "b"]
    if fusion == "mor":
        assert {task: tuple(gates.shape) for task, gates in output.gates.items()} == {
            "semseg": (2, 4, 3),
            "depth": (2, 4, 3),
        }
    else:
        assert output.gates == {}


def test_stage_1_gives_feature_maps_only() -> None:
    student = tiny(tasks=None).eval()
    pixels_B3HW = torch.randn(1, 3, 64, 96)
    maps, output = student(pixels_B3HW), student(pixels_B3HW, full=True)
    assert output.predictions == output.gates == {}
    for teacher in ("a", "b"):
        assert all(map(torch.equal, maps[teacher], output.feature_maps[teacher]))


def test_gates_weigh_what_the_heads_get() -> None:
    """With all weight on one expert, the others do not matter to any prediction."""
    student = tiny().eval()
    assert student.decoder is not None
    for routers in student.decoder.routers.values():
        for router in routers:
            nn.init.zeros_(router.mlp[-1].weight)
            router.mlp[-1].bias.data = torch.tensor([-1e4, 0.0, -1e4] + [0.0] * 3)
    pixels_B3HW = torch.randn(1, 3, 64, 96)
    before = student(pixels_B3HW, full=True)
    assert before.gates["depth"][0].tolist() == [[0, 1, 0]] * 4
    nn.init.normal_(student.paths["b"].output_norms[0].weight)
    after = student(pixels_B3HW, full=True)
    assert torch.equal(before.predictions["depth"], after.predictions["depth"])
    assert not torch.equal(before.feature_maps["b"][0], after.feature_maps["b"][0])
    nn.init.normal_(student.paths["a"].output_norms[0].weight)
    assert not torch.equal(before.predictions["depth"], student(pixels_B3HW)["depth"])


def test_noise_is_for_training_only() -> None:
    student = tiny()
    pixels_B3HW = torch.randn(1, 3, 64, 96)
    student.train()
    one, other = (student(pixels_B3HW, full=True).gates["depth"] for _ in range(2))
    assert not torch.equal(one, other)
    student.eval()
    assert torch.equal(*(student(pixels_B3HW)["depth"] for _ in range(2)))


@pytest.mark.parametrize("fusion", ["mor", "sum", "concat"])
def test_every_parameter_is_trained(fusion: str) -> None:
    student = tiny(fusion=fusion)
    output = student(torch.randn(2, 3, 64, 96), full=True)
    maps = [level for levels in output.feature_maps.values() for level in levels]
    torch.stack([x.square().mean() for x in (*maps, *output.predictions.values())]).sum().backward()
    assert [name for name, p in student.named_parameters() if p.grad is None] == []


def test_aligners_do_not_run_for_predictions() -> None:
    student = tiny().eval()
    calls: list[nn.Module] = []
    for aligner in student.paths["b"].aligners:
        aligner.register_forward_hook(lambda module, *_: calls.append(module))
    student(torch.randn(1, 3, 64, 96))
    assert calls == []
    student(torch.randn(1, 3, 64, 96), full=True)
    assert len(calls) == 4


def test_without_adapter_paths_the_stem_is_mapped_linearly() -> None:
    student = tiny(adapter_paths=False, fusion="sum").eval()
    assert student.experts == ["stem"]
    pixels_B3HW = torch.randn(1, 3, 64, 96)
    output = student(pixels_B3HW, full=True)
    tokens_BND = student.stem(pixels_B3HW)
    for teacher in ("a", "b"):
        levels = zip(student.stem.level_depths, student.paths[teacher].aligners, strict=True)
        for got, (block, aligner) in zip(output.feature_maps[teacher], levels, strict=True):
            tokens = tokens_BND[block][:, 1:] @ aligner.weight.T + aligner.bias
            expected = tokens.transpose(1, 2).reshape(1, -1, 4, 6)
            torch.testing.assert_close(got, expected)
    assert output.predictions["semseg"].shape == (1, 5, 64, 96)


def test_without_teachers_a_student_is_the_multi_task_baseline() -> None:
    student = tiny(teacher_dims={}, fusion="sum").eval()
    assert student.parameters_by_part().keys() - {"stem", "heads"} == {
        part for part, count in student.parameters_by_part().items() if count == 0
    }
    assert student(torch.randn(1, 3, 64, 96))["depth"].shape == (1, 1, 64, 96)


@pytest.mark.parametrize("stem", ["samvit_base_patch16_224", "vit_small_patch14_dinov2"])
def test_teachers_can_learn_the_tasks_themselves(stem: str) -> None:
    """The rows "Full" of Table 12 in training: every parameter learns."""
    student = tiny(stem=stem, teacher_dims={}, fusion="sum")
    predictions = student(torch.randn(1, 3, 64, 96))
    assert predictions["semseg"].shape == (1, 5, 64, 96)
    torch.stack([prediction.square().mean() for prediction in predictions.values()]).sum().backward()
    assert [name for name, parameter in student.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    ("parts", "left"),
    [
        (["stem"], r"paths\.|decoder\."),
        (["stem", "paths"], r"decoder\."),
        (["stem", "paths.a"], r"paths\.b\.|decoder\."),
        (["paths.a.aligners", "paths.b.aligners"], r"(?!paths\.\w\.aligners\.)"),
    ],
)
def test_frozen_parts_are_not_trained(parts: list[str], left: str) -> None:
    student = tiny()
    everything = trainable(student)
    student.freeze(*parts)
    assert trainable(student) == {name for name in everything if re.match(left, name)}
    student(torch.randn(2, 3, 64, 96))["depth"].sum().backward()
    assert {name for name, p in student.named_parameters() if p.grad is not None} <= trainable(student)


def test_a_part_that_is_not_there_cannot_be_frozen() -> None:
    with pytest.raises(RecipeError, match="did you mean stem"):
        tiny().freeze("stm")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fusion": "concat", "decoder": "upernet"},
        {"fusion": "sum", "adapter_paths": False},
        {"fusion": "sum", "teacher_dims": {}},
    ],
)
def test_a_saved_student_is_the_same_student(changes: dict[str, Any], tmp_path: Path) -> None:
    student = tiny(**changes)
    student.train()(torch.randn(2, 3, 64, 96))  # so that the running statistics of the heads are their own
    student.eval().save_pretrained(tmp_path)
    loaded = load_student(tmp_path)
    assert loaded.config == student.config
    pixels_B3HW = torch.randn(1, 3, 64, 96)
    expected, got = student(pixels_B3HW), loaded(pixels_B3HW)
    assert list(got) == ["semseg", "depth"]
    assert all(torch.equal(expected[task], got[task]) for task in expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {"a.b": 3}}, "letters, digits"),
        ({"tasks": {"train": 3}}, "name of a part"),
        ({"fusion": "moe"}, "did you mean mor"),
        ({"decoder": "simpel"}, "did you mean simple"),
        ({"teacher_dims": {}}, "routers have nothing"),
        ({"adapter_paths": False}, "routers have nothing"),
    ],
)
def test_what_cannot_be_built_says_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        tiny(**changes)
