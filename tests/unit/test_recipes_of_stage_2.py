"""The shipped recipes of stage 2, and the commands that docs/recipes.md gives for the paper's tables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cache_builder.recipe import BuildRecipe
from pipeline.recipe import load_recipe
from student.recipe import TrainRecipe

PAGE = Path(__file__).parents[2] / "docs/recipes.md"
COMMANDS = [c for c in re.findall(r"`(sak_stage\d_\w+ …[^`]*)`", PAGE.read_text()) if "{" not in c]


@pytest.mark.parametrize("data", ["pascal", "nyud"])
@pytest.mark.parametrize("size", ["small", "base", "large"])
def test_the_recipes_are_those_of_the_paper(data: str, size: str) -> None:
    recipe = load_recipe(TrainRecipe, f"sak_stage2_{data}_{size}")
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay, recipe.clip_norm) == (2e-5, 1e-6, 10)
    assert (recipe.schedule.kind, recipe.schedule.steps(1.0)) == ("poly", (40_000, 0))
    assert recipe.images_per_step(num_processes=2) == 4
    assert recipe.distillation.weight == 1
    assert recipe.student.stem == f"vit_{size}_patch16_384"
    assert recipe.multitask is not None
    cache = load_recipe(BuildRecipe, Path(recipe.cache).name)
    assert cache.views.policy == "multitask_train"
    assert cache.views.size == ((512, 512) if data == "pascal" else (448, 576))
    assert Path(cache.source.path).parts[-2:] == (f"{recipe.multitask.dataset.kind}_images", "train")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_page_is_a_recipe(command: str) -> None:
    name, _, *overrides = command.split()
    load_recipe(TrainRecipe, name, [override.rstrip(",") for override in overrides])


def test_the_page_has_commands() -> None:
    assert len(COMMANDS) >= 15
