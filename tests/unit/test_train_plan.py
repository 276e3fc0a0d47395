"""What a dry run says a training costs, and that the headers of the recipes say the same."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from teachercache import build_student
from teachercache.cache_builder.build_recipe import BuildRecipe
from teachercache.cache_builder.teachers import resolve_teacher
from teachercache.cache_builder.teachers.registry import teacher_gmacs
from teachercache.jobs.cli import app
from teachercache.jobs.recipes import SHIPPED, find_recipe, verb_of
from teachercache.jobs.train_dry_run import plan_training
from teachercache.pipeline.errors import RecipeError
from teachercache.pipeline.records.strict import Size
from teachercache.student.measuring.paper_results import PAPER
from teachercache.student.models.student import TeacherFacts
from teachercache.student.training.student_recipe import KpuRecipe, SakRecipe, StudentRecipe, first_student
from teachercache.student.training.train_plan import StudentSize, make_train_plan, student_size
from teachercache.student.training.train_recipe import TrainRecipe
from tests.make_cache import make_cache, make_images
from tests.train_recipes import train_recipe

CACHES = sorted(path.stem for path in SHIPPED.glob("*_vit*.yaml"))
OF_PAPERS = (path for kind in ("sak_stage", "kpu") for path in SHIPPED.glob(f"{kind}*.yaml"))
STUDENTS = sorted(path.stem for path in OF_PAPERS if verb_of(path) == "train")


def blank_size(
    recipe: StudentRecipe,
    image_size: Size,
    teachers: Mapping[str, TeacherFacts],
    tasks: Mapping[str, int] | None = None,
    distills: bool = True,
) -> StudentSize:
    student = first_student(recipe, teachers, image_size, tasks, distills=distills, blank=True)
    return student_size(recipe, student, teachers, distills=distills)


@pytest.mark.parametrize("name", STUDENTS)
def test_the_header_says_the_hours_that_its_command_prints(name: str) -> None:
    header = (SHIPPED / f"{name}.yaml").read_text()
    stated = re.search(r"# Hours +([\d.]+) at least: (\d) GPUs that sustain 200 TFLOP/s", header)
    command = re.search(r"teachercache (train (\w+) --dry-run .*)", header)
    assert stated
    assert command
    assert command[2] == name
    done = CliRunner().invoke(app, command[1].split())
    assert done.exit_code == 0, done.output
    words = " ".join(done.output.split())
    printed = re.search(r"(hours|minutes) at least ([\d.]+) on (\d) GPUs at 200 TFLOP/s", words)
    assert printed
    assert printed[3] == stated[2]
    hours = float(printed[2]) / {"hours": 1, "minutes": 60}[printed[1]]
    assert float(stated[1]) == pytest.approx(hours, rel=0.05)


@pytest.mark.parametrize("name", CACHES)
def test_the_header_says_the_hours_that_plan_gives(name: str) -> None:
    """`plan` multiplies the same GMACs with the rows that it finds; the images are not here."""
    pattern = rf"# Hours +([\d.]+) GPU-hours at least, ([\d,]+) images in (\d+) views? .*\n.* plan {name} "
    stated = re.search(pattern, (SHIPPED / f"{name}.yaml").read_text())
    assert stated
    recipe = find_recipe(BuildRecipe, name)
    assert int(stated[3]) == recipe.views.num_views
    specs = (resolve_teacher(n, t, recipe.views.size, recipe.sak_compat) for n, t in recipe.teachers.items())
    flops = 2e9 * sum(map(teacher_gmacs, specs)) * int(stated[2].replace(",", "")) * recipe.views.num_views
    hours = flops / (recipe.plan.tflops * 1e12) / 3600
    assert float(stated[1]) == pytest.approx(hours, rel=0.05)


def test_hours_are_arithmetic_over_rate() -> None:
    """SAK, Table 21: 198 GMACs of the ViT-L student at 384², to which attention adds 8%."""
    recipe = find_recipe(TrainRecipe, "sak_stage1_large")
    teachers = dict.fromkeys(("dinov2", "clip", "sam"), TeacherFacts(1024, (24, 24)))
    student = first_student(recipe.student, teachers, (384, 384), None, distills=True, blank=True)
    arguments: dict[str, Any] = {"num_samples": 1280, "processes": 8, "row_bytes": 1000}
    plan = make_train_plan(recipe, student, teachers, tflops_per_gpu=100, **arguments)
    gmacs = plan.size.gmacs
    assert gmacs == pytest.approx(PAPER["gmacs"]["student"] * 1.08, rel=0.01)
    assert gmacs - plan.size.attention_gmacs == pytest.approx(PAPER["gmacs"]["student"], rel=0.01)
    assert (plan.steps, plan.images) == (300, 38_400)
    # Backward computes twice what forward does, but no gradient of the pixels.
    assert plan.gpu_hours == pytest.approx(38_400 * 3 * 2 * gmacs * 1e9 / 100e12 / 3600, rel=2e-3)
    assert plan.hours == pytest.approx(plan.gpu_hours / 8)
    assert plan.read_bytes_per_s == pytest.approx(1000 * 38_400 / plan.hours / 3600)


def test_a_kpu_s_parts_are_told_apart() -> None:
    """What runs between the sentinel's blocks is no part of them."""
    teachers = {"a": TeacherFacts(192, (4, 4))}
    size, sak = (
        blank_size(kind(stem="vit_tiny_patch16_224"), (64, 64), teachers) for kind in (KpuRecipe, SakRecipe)
    )
    assert size.gmacs_by_part["stem"] == pytest.approx(sak.gmacs_by_part["stem"])
    assert size.attention_gmacs == pytest.approx(sak.attention_gmacs)
    assert {"spatial prior", "interactions", "projections"} <= size.gmacs_by_part.keys()
    assert size.num_parameters == sum(size.parameters.values()) - 2 * 2 * (192 * 192 + 192)


def test_what_is_frozen_costs_a_forward_pass_and_what_passes_through_it() -> None:
    """A KPU's sentinel needs no gradients of weights, and before its first injector none at all."""
    frozen, whole = (
        blank_size(
            KpuRecipe(stem="vit_tiny_patch16_224", preservation=preservation),
            (64, 64),
            {"a": TeacherFacts(192, (4, 4))},
        )
        for preservation in (True, False)
    )
    assert whole.train_gmacs == pytest.approx(3 * whole.gmacs, rel=0.02)
    assert 2 * frozen.gmacs < frozen.train_gmacs < 2.8 * frozen.gmacs


PASCAL = {"semseg": 21, "parts": 7, "saliency": 2, "normals": 3, "boundary": 1}


def size_of(*overrides: str, width: int = 768, tasks: dict[str, int] | None = PASCAL) -> StudentSize:
    name = "sak_stage2_pascal_base" if tasks else "sak_stage1_base"
    recipe = find_recipe(TrainRecipe, name, list(overrides))
    names = ("dinov2", "clip", "sam") if recipe.teachers is None else recipe.teachers
    side = 512 if tasks else 384
    teachers = dict.fromkeys(names, TeacherFacts(width, (side // 16, side // 16)))
    return blank_size(recipe.student, (side, side), teachers, tasks, distills=recipe.distills)


def test_the_parts_are_those_of_table_22() -> None:
    size = size_of(width=1024)
    adapters = size.parameters["adapter paths"] + size.parameters["output norms"]
    counts = [size.parameters["stem"], adapters, size.parameters["routers"]]
    gmacs = [
        size.gmacs_by_part["stem"] - size.attention_gmacs,
        size.gmacs_by_part["adapter paths"],
        size.gmacs_by_part["routers and other"],
    ]
    assert [round(sum(counts[:n]) / 1e6) for n in (1, 2, 3)] == [86, 98, 104]
    assert [round(sum(gmacs[:n])) for n in (1, 2, 3)] == [88, 99, 106]  # 100 in the paper, 99.6 in fvcore
    assert size.parameters["aligners"] == 9_449_472
    assert size.num_parameters == 133_506_089, "aligners are no overhead of inference (SAK, B.1)"
    assert size.trained == size.num_parameters + 9_449_472


def test_one_command_prints_table_21() -> None:
    """The paper has 198 and 1,948 in the last two places of MACs."""
    command = "train sak_stage1_large --dry-run --costs --processes 8 --samples 1281167"
    done = CliRunner().invoke(app, command.split(), env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    _, table = done.output.split("Table 21")
    rows = [line.split() for line in table.splitlines() if re.search("input|#Param|GMACs", line)]
    assert rows[0][1:] == ["384×384", "384×384", "1024×1024", "384×384"]
    assert rows[1][1:] == ["304M", "304M", "307M", "343M", "1,258M"]
    assert rows[2][-5:] == ["221", "221", "1,308", "197", "1,947"]


def test_what_is_frozen_has_no_backward() -> None:
    """SAK, Table 12, "Freeze": 36M trained. Only routers and heads have gradients, and none leaves them."""
    whole, frozen = size_of(), size_of("student.freeze=[stem,paths]", "distillation.weight=0")
    assert round(frozen.trained / 1e6) == 36
    forward, learning = whole.gmacs, frozen.gmacs_by_part["heads"] + frozen.gmacs_by_part["routers and other"]
    assert frozen.gmacs == pytest.approx(forward)
    assert forward + 1.9 * learning < frozen.train_gmacs < forward + 2 * learning
    assert whole.train_gmacs == pytest.approx(3 * forward, rel=2e-3)


def test_a_student_that_grows_learns_one_path(tmp_path: Path) -> None:
    with torch.device("meta"):
        dims = dict.fromkeys(("dinov2", "clip", "sam"), 768)
        config = build_student(
            "sak", stem="vit_base_patch16_384", teacher_dims=dims, image_size=(384, 384), sak_compat=True
        ).config
    (tmp_path / "config.json").write_text(json.dumps({"kind": "sak", **config}))
    grown = size_of("teachers=[siglip]", f"student.init_from={tmp_path}", tasks=None)
    path = grown.gmacs_by_part["adapter paths"] / 4
    forward = grown.gmacs
    assert grown.trained * 4 == grown.parameters["adapter paths"] + grown.parameters["output norms"]
    assert forward + 1.9 * path < grown.train_gmacs < forward + 2 * path
    with pytest.raises(RecipeError, match=r"student.reduction: 2"):
        size_of("teachers=[siglip]", f"student.init_from={tmp_path}", "student.reduction=2", tasks=None)


def test_levels_that_a_teacher_lacks_cost_nothing() -> None:
    recipe = find_recipe(TrainRecipe, "sak_stage1_base")
    every, last = (
        blank_size(recipe.student, (384, 384), {"clip": TeacherFacts(512, (24, 24), num_levels=count)})
        for count in (4, 1)
    )
    assert every.trained - last.trained == 3 * (768 * 512 + 512 + 2 * 768)  # aligners and output norms
    assert last.train_gmacs < every.train_gmacs


def test_an_amalgam_reads_the_grids_of_its_cache() -> None:
    """Without a stem the heads work on SAM's grid, and linear layers cost four times what they do on 32²."""
    overrides = ["student.kind=amalgam", "student.init_from=null", "distillation.weight=0", "teachers=[sam]"]
    recipe = find_recipe(
        TrainRecipe, "sak_stage2_pascal_base", [*overrides, "student.stem=null", "student.fusion=sum"]
    )
    coarse, fine = (
        blank_size(
            recipe.student, (512, 512), {"sam": TeacherFacts(768, grid)}, PASCAL, distills=recipe.distills
        )
        for grid in ((32, 32), (64, 64))
    )
    linears = 5 * 4 * 768 * 192 / 1e9
    gained = fine.gmacs - coarse.gmacs
    assert gained == pytest.approx(linears * (64**2 - 32**2))
    assert fine.trained == fine.num_parameters == fine.parameters["heads"]


def test_nothing_to_learn_is_refused() -> None:
    with pytest.raises(RecipeError, match="Every part of the student is frozen"):
        size_of("student.freeze=[stem,paths,decoder]", "distillation.weight=0")


def test_a_cache_that_is_there_is_asked(tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", make_images(tmp_path / "images", 7))
    recipe = train_recipe(tmp_path / "cache", tmp_path / "run", schedule={"epochs": 4})
    plan = plan_training(recipe, processes=1, tflops_per_gpu=1)
    assert plan.steps == 14
    assert plan.row_bytes == 4 * 2 * 2 * 8 * 4 + 4 * 3 * 3 * 4 * 2 + 2 * 20
    unread = recipe.model_copy(update={"features": "online"})
    assert plan_training(unread, processes=1, tflops_per_gpu=1).row_bytes == 0


def test_epochs_need_a_number_of_images() -> None:
    recipe = find_recipe(TrainRecipe, "sak_stage1_small")
    with pytest.raises(RecipeError, match="--samples"):
        plan_training(recipe, processes=8, tflops_per_gpu=200)
