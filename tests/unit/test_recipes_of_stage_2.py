"""The shipped recipes of stage 2, and the commands that docs/recipes.md gives for the paper's tables."""

from __future__ import annotations

import json
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import torch

from teachercache import build_student
from teachercache.cache_builder.build_recipe import BuildRecipe
from teachercache.cache_builder.plan import bytes_per_row
from teachercache.cache_builder.teachers import resolve_teacher
from teachercache.jobs.recipes import SHIPPED, find_recipe
from teachercache.jobs.train_dry_run import plan_training
from teachercache.student.datasets import dataset_class
from teachercache.student.measuring.paper_results import KPU_ROWS, PAPER, paper_rows
from teachercache.student.models.student import TeacherFacts
from teachercache.student.training.student_recipe import first_student
from teachercache.student.training.train_plan import make_train_plan
from teachercache.student.training.train_recipe import DistillationRecipe, TrainRecipe

PAGE = Path(__file__).parents[2] / "docs/recipes.md"
CELLS = r"\| (?P<tables>[\d, ]+) \| (?P<what>.+?) \| `(?P<command>sak_stage\d_\w+ …[^`]*)`(?P<where>.*?)"
FIGURES = r" \| (?P<expected>.*?) \| (?:(?P<runs>\d) × )?(?P<hours>[\d.]+) \|"
ROWS = list(re.finditer(f"^{CELLS}{FIGURES}$", PAGE.read_text(), re.MULTILINE))
BLOCKS = "".join(re.findall(r"^```\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)).replace(
    "\\\n", " "
)


def recipe_of(command: str) -> TrainRecipe:
    name, _, *overrides = command.split()
    return find_recipe(TrainRecipe, name, overrides)


def row(tables: str, what: str) -> re.Match[str]:
    (found,) = (row for row in ROWS if row["tables"] == tables and row["what"].startswith(what))
    return found


@cache
def hours_of(recipe: str, processes: int, grown: str | None) -> float:
    """Before there is a cache; of a student that grows, and of the grown one, from its teachers' widths."""
    parsed = TrainRecipe.model_validate_json(recipe)
    if grown is None:
        return plan_training(parsed, processes=processes, tflops_per_gpu=200, num_samples=1_281_167).hours
    three = ["dinov2", "clip", "sam"]
    teachers, size = ([*three, "siglip"], (512, 512)) if parsed.multitask else (["siglip"], (384, 384))
    with torch.device("meta"):
        before = build_student(
            "sak",
            stem=parsed.student.stem,
            teacher_dims=dict.fromkeys(three, 768),
            image_size=size,
            sak_compat=True,
        )
    (Path(grown) / "config.json").write_text(json.dumps({"kind": "sak", **before.config}))
    student = parsed.student.model_copy(update={"init_from": grown})
    facts = dict.fromkeys(teachers, TeacherFacts(768, (size[0] // 16, size[1] // 16)))
    tasks = dataset_class("pascal_context").tasks if parsed.multitask else None
    return make_train_plan(
        parsed,
        first_student(student, facts, size, tasks, distills=parsed.distills, blank=True),
        facts,
        num_samples=1_281_167,
        row_bytes=0,
        processes=processes,
        tflops_per_gpu=200,
    ).hours


@pytest.mark.parametrize("line", ROWS, ids=lambda line: f"{line['tables']}: {line['what']}")
def test_a_line_says_what_its_dry_run_prints(line: re.Match[str], tmp_path: Path) -> None:
    recipe = recipe_of(line["command"])
    decides = recipe.model_copy(
        update={"output": "", "distillation": DistillationRecipe(weight=float(recipe.distills))}
    )
    grown = str(tmp_path) if "one-more-teacher" in line["where"] else None
    if "other-clips" in line["where"]:  # a cache of teachers that cost heads what CLIP's features do
        decides = decides.model_copy(update={"teachers": ("clip",)})
    hours = hours_of(decides.model_dump_json(), 2 if recipe.multitask else 8, grown)
    assert float(line["hours"]) == pytest.approx(hours, rel=0.06)
    assert int(line["runs"] or 1) == (
        1 if "one run a task" not in line["what"] else 4 + ("pascal" in line["command"])
    )


@pytest.mark.parametrize(
    "line", [row for row in ROWS if "stage2" in row["command"]], ids=lambda line: line["what"]
)
def test_a_line_expects_what_the_paper_prints(line: re.Match[str]) -> None:
    recipe = recipe_of(line["command"])
    assert recipe.multitask
    dataset = recipe.multitask.dataset.kind
    backbone = {"small": "ViT-S", "base": "ViT-B", "large": "ViT-L"}[
        line["command"].split()[0].split("_")[-1]
    ]
    figures = [float(figure) for figure in line["expected"].split()]
    for table in map(int, line["tables"].split(", ")):
        rows = [row for row in paper_rows(dataset, None, table) if row.backbone == backbone]
        assert figures in [
            [*row.scores.values(), *(figures[len(row.scores) :] if row.gain is None else [row.gain])]
            for row in rows
        ]


def header_of(recipe: str) -> str:
    header, _, _ = (SHIPPED / f"{recipe}.yaml").read_text().partition("\ncache:")
    return " ".join(line.lstrip("# ") for line in header.splitlines())


@pytest.mark.parametrize("size", ["small", "base", "large"])
@pytest.mark.parametrize(("data", "dataset"), [("pascal", "pascal_context"), ("nyud", "nyud")])
def test_a_header_expects_what_the_paper_prints(size: str, data: str, dataset: str) -> None:
    title, _, header = header_of(f"sak_stage2_{data}_{size}").partition("Metric ")
    stated = re.findall(r"((?:(?:[a-z]+ )?[\d.]+, )+)Δm (-?[\d.]+) \(Table (\d+)\)", header)
    assert len(stated) == 1 + ((size, data) == ("base", "pascal"))  # whose teachers are ViT-B too
    for scores, gain, table in stated:
        rows = [
            row for row in paper_rows(dataset, None, int(table)) if row.backbone == f"ViT-{size[0].upper()}"
        ]
        (row,) = (row for row in rows if row.model.startswith("SAK of") and row.gain == float(gain))
        assert [float(figure) for figure in re.findall(r"[\d.]+", scores)] == list(row.scores.values())
        assert f"ViT-{size[0].upper()} student ({row.parameters_m}M parameters)" in title
        assert re.findall("[a-z]+", scores) in (["cache"], list(row.scores))  # or in their order alone


def scores_of(table: int, model: str) -> list[float]:
    """Of the first of KPU's rows whose name begins so."""
    return next(
        [*found.values()] for one, name, found, _ in KPU_ROWS if one == table and name.startswith(model)
    )


def test_decoders_are_expected_to_do_what_the_paper_prints() -> None:
    expected = {
        "KPU, frozen": (1, "KPU†"),
        "KPU, learnt": (1, "KPU, learnt"),
        "Base_a, frozen": (2, "Base_a"),
        "Base_b, frozen": (2, "Base_b"),
        "Base_c, frozen": (2, "Base_c"),
        "CLIP alone, frozen": (3, "KPU of CLIP"),
        "GroundingDINO alone, frozen": (3, "KPU of GroundingDINO"),
        "GroundingDINO†": (1, "GroundingDINO†"),
        "CLIP†": (1, "CLIP†"),
        "DINOv2†": (1, "DINOv2†"),
    }
    rows = [line.strip("|").split("|") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    printed = {cells[1].strip(): cells[3].strip() for cells in rows if len(cells) == 4}
    assert {title: printed[title] for title in expected} == {
        title: " ".join(map(str, scores_of(*row))) for title, row in expected.items()
    }


def test_figures_of_stage_1_and_of_probes_are_those_that_the_papers_print() -> None:
    page = " ".join(PAGE.read_text().split())
    for recipe, student in (
        ("base …", "adapter paths"),
        ("base … student.adapter_paths=false", "no adapter paths"),
    ):
        dinov2, clip, sam, mean = map("{:.4f}".format, PAPER["similarities"][student].values())
        (line,) = (row for row in ROWS if row["command"].partition(" output=")[0] == f"sak_stage1_{recipe}")
        assert line["expected"].startswith(
            f"similarity {dinov2} to DINOv2, {clip} to CLIP, {sam} to SAM; {mean}"
        )
    dinov2, clip, sam, mean = map("{:.2f}".format, PAPER["similarities"]["adapter paths"].values())
    similarity = (
        f"similarity {mean} on the validation set (DINOv2 {dinov2}, CLIP {clip}, SAM {sam}; Table 17)"
    )
    assert similarity in header_of("sak_stage1_base")
    for table in (1, 2):
        assert f"top-1 {scores_of(table, 'KPU')[3]} of a linear layer" in header_of("kpu_base")
    three, one, dino = (
        "{:.3f} and {:.3f}".format(*PAPER["depth_probes"][model])
        for model in (
            "SAK of 3 teachers, ViT-B/16",
            "SAK of DINOv2, ViT-B/16",
            "DINOv2 (teacher upper bound), ViT-B/14",
        )
    )
    assert f"{three} m for SAK of three teachers, {one} for SAK of DINOv2, {dino} for DINOv2." in page
    student, in_all = PAPER["gmacs"].values()
    assert f"the paper has {student} and {in_all} in the last two places" in page
    (oracle,) = (row for row in paper_rows("pascal_context", None, 2) if row.model == "Oracle of teachers")
    assert f"in Table 12: {' '.join(f'{score:.2f}' for score in oracle.scores.values())}." in page


def test_tables_of_the_paper_have_lines() -> None:
    tables = {int(table) for line in ROWS for table in line["tables"].split(", ")}
    assert tables >= {2, 3, 4, 5, 6, 7, 8, 12, 13, 14, 15, 16, 17, 18, 19, 20, 23, 24, 25}


def test_table_13_is_not_table_12() -> None:
    """The same student of ViT-L teachers: other caches in both stages, and aligners to distil with."""
    lines = row("3, 4, 7, 8, 12, 18, 20, 25", "SAK, ViT-B"), row("8, 13", "SAK, ViT-B")
    of_b, of_l = (recipe_of(line["command"]) for line in lines)
    assert of_l.cache != of_b.cache
    stage_1 = recipe_of(row("8, 13, 14", "ViT-B, of ViT-L teachers")["command"])
    assert of_l.student.init_from == f"{stage_1.output}/student" != of_b.student.init_from
    assert Path(stage_1.cache).name == "imagenet1k_vitl"
    small, large = (plan_training(recipe, processes=2, tflops_per_gpu=200).size for recipe in (of_b, of_l))
    assert large.parameters["aligners"] == 9_449_472
    assert small.num_parameters == large.num_parameters == 133_506_089


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("sak_stage*.yaml")))
def test_a_header_says_what_the_papers_own_loss_would_take(name: str) -> None:
    header, _, _ = (SHIPPED / f"{name}.yaml").read_text().partition("\ncache:")
    assert "# Differs   from the paper: " in header
    told = header.partition("# Exact ")[2]
    here, exact = (float(number.replace(",", "")) for number in re.findall(r"([\d.,]+) TB", told))
    overrides = re.findall(r"(?:views|teachers)\.\S+=\S+", told)
    recipe = find_recipe(TrainRecipe, name)
    images = (
        1_281_167
        if recipe.multitask is None
        else {"pascal_context": 4998, "nyud": 795}[recipe.multitask.dataset.kind]
    )
    for stated, chosen in ((here, []), (exact, overrides)):
        build = find_recipe(BuildRecipe, Path(recipe.cache).name, chosen)
        specs = [resolve_teacher(n, t, build.views.size, build.sak_compat) for n, t in build.teachers.items()]
        nbytes = images * build.views.num_views * sum(map(bytes_per_row, specs))
        assert stated == pytest.approx(nbytes / 1e12, rel=0.005)
    exactly = [resolve_teacher(n, t, build.views.size, build.sak_compat) for n, t in build.teachers.items()]
    assert {(spec.grid.kind, spec.codec) for spec in exactly} == {("native", "f16")}


def test_commands_in_full_are_recipes() -> None:
    lines = BLOCKS.splitlines()
    builds = [shlex.split(line)[2:] for line in lines if line.startswith("teachercache build")]
    trainings = [shlex.split(line.split("student.py")[1]) for line in lines if "train_student.py" in line]
    teachers = [list(find_recipe(BuildRecipe, name, overrides).teachers) for name, *overrides in builds]
    assert ["siglip"] in teachers
    assert ["dinov2", "clip", "sam", "siglip"] in teachers
    assert len(trainings) == 2
    for name, *overrides in trainings:
        find_recipe(TrainRecipe, name, overrides)


@pytest.mark.parametrize("data", ["pascal", "nyud"])
@pytest.mark.parametrize("size", ["small", "base", "large"])
def test_the_recipes_are_those_of_the_paper(data: str, size: str) -> None:
    recipe = find_recipe(TrainRecipe, f"sak_stage2_{data}_{size}")
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay, recipe.clip_norm) == (2e-5, 1e-6, 10)
    assert (recipe.schedule.kind, recipe.schedule.steps(1.0)) == ("poly", (40_000, 0))
    assert recipe.images_per_step(num_processes=2) == 4
    assert recipe.distillation.weight == 1
    assert recipe.student.stem == f"vit_{size}_patch16_384"
    assert recipe.multitask is not None
    build = find_recipe(BuildRecipe, Path(recipe.cache).name)
    assert build.views.policy == "multitask_train"
    assert build.views.size == ((512, 512) if data == "pascal" else (448, 576))
    assert Path(build.source.path).parts[-2:] == (f"{recipe.multitask.dataset.kind}_images", "train")
