"""What a dry run says a training costs, and that the headers of the recipes say the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cache_builder.recipe import BuildRecipe
from cache_builder.teachers import resolve_teacher
from cache_builder.teachers.flops import teacher_gmacs
from jobs.cli import app
from jobs.train_plan import plan_training
from pipeline.errors import RecipeError
from pipeline.recipe import SHIPPED, load_recipe
from student.recipe import TrainRecipe
from student.train_plan import make_train_plan
from tests.make_cache import make_cache, make_images
from tests.train_recipes import train_recipe

CACHES = sorted(path.stem for path in SHIPPED.glob("*_vit*.yaml"))
STUDENTS = sorted(path.stem for path in SHIPPED.glob("sak_stage*.yaml"))


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
    printed = re.search(r"at least ([\d.]+) on (\d) GPUs at 200 TFLOP/s", " ".join(done.output.split()))
    assert printed
    assert printed[2] == stated[2]
    assert float(stated[1]) == pytest.approx(float(printed[1]), rel=0.05)


@pytest.mark.parametrize("name", CACHES)
def test_the_header_says_the_hours_that_plan_gives(name: str) -> None:
    """`plan` multiplies the same GMACs with the rows that it finds; the images are not here."""
    pattern = rf"# Hours +([\d.]+) GPU-hours at least, ([\d,]+) images in (\d+) views? .*\n.* plan {name} "
    stated = re.search(pattern, (SHIPPED / f"{name}.yaml").read_text())
    assert stated
    recipe = load_recipe(BuildRecipe, name)
    assert int(stated[3]) == recipe.views.num_views
    specs = (resolve_teacher(n, t, recipe.views.size) for n, t in recipe.teachers.items())
    flops = 2e9 * sum(map(teacher_gmacs, specs)) * int(stated[2].replace(",", "")) * recipe.views.num_views
    hours = flops / (recipe.plan.teacher_tflops_per_gpu * 1e12) / 3600
    assert float(stated[1]) == pytest.approx(hours, rel=0.05)


def test_hours_are_arithmetic_over_rate() -> None:
    """SAK, Table 21: 198 GMACs of the ViT-L student at 384², to which attention adds 8%."""
    recipe = load_recipe(TrainRecipe, "sak_stage1_large")
    arguments: dict[str, Any] = {"num_samples": 1280, "processes": 8, "row_bytes": 1000}
    dims = {"dinov2": 1024, "clip": 1024, "sam": 1024}
    plan = make_train_plan(
        recipe, image_size=(384, 384), teacher_dims=dims, tasks=None, tflops_per_gpu=100, **arguments
    )
    assert plan.gmacs == pytest.approx(198 * 1.08, rel=0.01)
    assert (plan.steps, plan.images) == (300, 38_400)
    # Backward computes twice what forward does, but no gradient of the pixels.
    assert plan.gpu_hours == pytest.approx(38_400 * 3 * 2 * plan.gmacs * 1e9 / 100e12 / 3600, rel=2e-3)
    assert plan.hours == pytest.approx(plan.gpu_hours / 8)
    assert plan.read_bytes_per_s == pytest.approx(1000 * 38_400 / plan.hours / 3600)


def test_a_cache_that_is_there_is_asked(tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", make_images(tmp_path / "images", 7))
    recipe = train_recipe(tmp_path / "cache", tmp_path / "run", schedule={"epochs": 4})
    plan = plan_training(recipe, processes=1, tflops_per_gpu=1)
    assert plan.steps == 14
    assert plan.row_bytes == 4 * 2 * 2 * 8 * 4 + 4 * 3 * 3 * 4 * 2 + 2 * 20
    unread = recipe.model_copy(update={"features": "online"})
    assert plan_training(unread, processes=1, tflops_per_gpu=1).row_bytes == 0


def test_epochs_need_a_number_of_images() -> None:
    recipe = load_recipe(TrainRecipe, "sak_stage1_small")
    with pytest.raises(RecipeError, match="--samples"):
        plan_training(recipe, processes=8, tflops_per_gpu=200)
