"""The recipes that we ship, as YAML files in this folder, and how launchers find them by name."""

import re
from collections.abc import Sequence
from pathlib import Path

from teachercache.pipeline.errors import RecipeError
from teachercache.pipeline.recipe_files import Model, load_recipe

SHIPPED = Path(__file__).parent


def find_recipe(model: type[Model], path: str | Path, overrides: Sequence[str] = ()) -> Model:
    """The recipe at `path`, or the one of that name here, with overrides applied. Raises `RecipeError`."""
    file = SHIPPED / f"{path}.yaml" if (SHIPPED / f"{path}.yaml").is_file() else Path(path)
    wanted = _VERBS.get(model.__name__)
    if wanted and file.is_file() and (verb := verb_of(file)) not in (None, wanted):
        raise RecipeError(
            f"{file.stem} is not a recipe for {wanted}.",
            got=f"a recipe for {verb}",
            expected=f"a recipe for {wanted}: teachercache recipes lists those that ship",
            do=f"run teachercache {verb} {path}",
        )
    return load_recipe(model, path, overrides, shipped=SHIPPED)


_VERBS = {"BuildRecipe": "build", "TrainRecipe": "train", "DecoderRecipe": "train-decoders"}
_KEYS = {"build": {"source", "views"}, "train-decoders": {"decoders"}, "train": {"student", "schedule"}}


def verb_of(file: Path) -> str | None:
    """Which verb a recipe is for, by the keys that only its kind has; None where it has none or of both."""
    stated = set(re.findall(r"^(\w+):", file.read_text("utf-8", "replace"), re.MULTILINE))
    if stated & _KEYS["train-decoders"]:  # they have a student and a schedule as well
        return "train-decoders"
    verbs = [verb for verb, keys in _KEYS.items() if stated & keys]
    return verbs[0] if len(verbs) == 1 else None
