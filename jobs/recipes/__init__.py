"""The recipes that we ship, as YAML files in this folder, and how launchers find them by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from teachercache.pipeline.recipe_files import Model, load_recipe

SHIPPED = Path(__file__).parent


def find_recipe(model: type[Model], path: str | Path, overrides: Sequence[str] = ()) -> Model:
    """The recipe at `path`, or the one with that name here, with overrides. Raises `RecipeError`."""
    return load_recipe(model, path, overrides, shipped=SHIPPED)
