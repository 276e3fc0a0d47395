"""Tasks on the teachers' features: which grid the heads see, and that it outlives saving."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from teachercache.pipeline.records.spec import GridSpec
from teachercache.pipeline.records.strict import Size
from teachercache.student.build import load_student
from teachercache.student.models.amalgam import Amalgam
from teachercache.student.models.student import StudentOutput
from teachercache.student.training.student_recipe import unfit_experts
from tests.make_cache import teacher_spec

IMAGE = (64, 96)
PATCHES = (4, 6)  # of 16 pixels: the stem's grid
TASKS = {"semseg": 5, "depth": 1}


def amalgam(
    widths: dict[str, int], stem: str | None = None, fusion: str = "sum", decoder: str = "simple"
) -> Amalgam:
    torch.manual_seed(0)
    return Amalgam(stem, widths, IMAGE, TASKS, fusion=fusion, decoder=decoder).eval()


def features(grids: dict[str, Size], widths: dict[str, int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(2, 4, *grid, widths[name], generator=generator) for name, grid in grids.items()}


@pytest.mark.parametrize("decoder", ["simple", "upernet"])
@pytest.mark.parametrize(
    ("stem", "fusion", "grids", "expected"),
    [
        (None, "sum", {"sam": (11, 16)}, (11, 16)),
        (None, "sum", {"dino": (3, 5)}, (3, 5)),
        (None, "concat", {"dino": (5, 7), "sam": (11, 16)}, (11, 16)),
        (None, "mor", {"sam": (11, 16), "dino": (5, 7)}, (11, 16)),
        ("test_vit", "mor", {"dino": (5, 7), "sam": (11, 16)}, PATCHES),
        ("test_vit", "mor", {"dino": (2, 3)}, PATCHES),
        ("test_vit", "sum", {"dino": PATCHES}, PATCHES),
    ],
)
def test_heads_see_the_grid_of_the_stem_or_else_the_finest(
    stem: str | None, fusion: str, grids: dict[str, Size], expected: Size, decoder: str
) -> None:
    widths = {name: {"sam": 32, "dino": 16}[name] for name in grids}
    student = amalgam(widths, stem, fusion=fusion, decoder=decoder)
    seen = []
    for head in student.decoder.heads.values():
        head.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]))
    with torch.no_grad():
        output = student(torch.zeros(2, 3, *IMAGE), full=True, features=features(grids, widths))
    assert isinstance(output, StudentOutput)
    assert {tuple(map_BChw.shape[2:]) for map_BChw in seen} == {expected}
    shapes = {task: tuple(prediction.shape) for task, prediction in output.predictions.items()}
    assert shapes == {task: (2, channels, *IMAGE) for task, channels in TASKS.items()}


def test_fusion_costs_what_the_paper_says() -> None:
    """SAK, Table 19, at 512² with three ViT-B teachers: 1091 G MACs of addition, 1097 of routers, 7661 of
    concatenation. Counted by the differences, in which encoders, counted otherwise there, do not stand."""
    grids = {"dinov2": (37, 37), "clip": (32, 32), "sam": (64, 64)}
    tasks = {"semseg": 21, "parts": 7, "saliency": 2, "normals": 3, "boundary": 1}
    gmacs = {}
    with torch.device("meta"), torch.no_grad():
        given = {name: torch.empty(1, 4, *grid, 768) for name, grid in grids.items()}
        for fusion in ("sum", "mor", "concat"):
            widths = dict.fromkeys(grids, 768)
            student = Amalgam("vit_base_patch16_384", widths, (512, 512), tasks, fusion=fusion).eval()
            with FlopCounterMode(display=False) as counter:
                student(torch.empty(1, 3, 512, 512), features=given)
            gmacs[fusion] = counter.get_total_flops() / 2e9
    assert gmacs["mor"] - gmacs["sum"] == pytest.approx(6, abs=0.5)
    assert gmacs["concat"] - gmacs["sum"] == pytest.approx(6570, rel=0.005)


def test_a_teacher_of_its_own_is_left_as_it_is() -> None:
    widths = {"sam": 16}
    student, given = amalgam(widths), features({"sam": (8, 12)}, widths)
    seen: list[Tensor] = []
    student.decoder.heads["depth"].register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]))
    with torch.no_grad():
        student(torch.zeros(2, 3, *IMAGE), features=given)
    torch.testing.assert_close(torch.stack(seen, dim=1), given["sam"].permute(0, 1, 4, 2, 3))


def test_a_loaded_student_works_on_the_same_grid(tmp_path: Path) -> None:
    widths = {"dino": 16, "sam": 32}
    student, given = (
        amalgam(widths, fusion="mor"),
        features({"dino": (5, 7), "sam": (11, 16)}, widths),
    )
    student.save_pretrained(tmp_path)
    pixels = torch.rand(2, 3, *IMAGE)
    with torch.no_grad():
        expected, found = (one(pixels, features=given) for one in (student, load_student(tmp_path)))
        pooled = given | {"sam": F.avg_pool2d(given["sam"].flatten(0, 1).movedim(-1, 1), 2)}
        pooled["sam"] = pooled["sam"].movedim(1, -1).unflatten(0, (2, 4))
        coarse = student(pixels, features=pooled)
    for task in TASKS:
        assert torch.equal(found[task], expected[task])
        assert not torch.allclose(coarse[task], expected[task], rtol=0.1)


def test_experts_have_a_map_for_every_level() -> None:
    one = teacher_spec().model_copy(update={"block_indices": (11,)})
    adjoint = teacher_spec(grid=4).model_copy(update={"grid": GridSpec(kind="adjoint", size=(2, 2))})
    teachers = {"whole": teacher_spec(), "one": one, "adjoint": adjoint}
    unfit = [str(problem) for problem in unfit_experts(teachers)]
    assert len(unfit) == 2
    assert "those of adjoint are not in the cache" in unfit[0]
    assert re.search(r"one cannot be an expert(.|\n)*1 levels", unfit[1])
