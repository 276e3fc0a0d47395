"""Recipes: a YAML file that completely states a run, `key.sub=value` overrides, and a checked model.

`load_recipe(BuildRecipe, "imagenet.yaml", ["views.num_views=4"])` → `BuildRecipe`. An unknown key is
an error that names the nearest known one.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from pipeline.environment import named_variables
from pipeline.errors import RecipeError

Model = TypeVar("Model", bound=BaseModel)
SHIPPED = Path(__file__).parent.parent / "jobs" / "recipes"


def load_recipe(model: type[Model], path: str | Path, overrides: Sequence[str] = ()) -> Model:
    """The recipe at `path` (or a shipped one, by name) with overrides applied. Raises `RecipeError`."""
    with named_variables(path):
        return _load(model, _find(Path(path)), overrides)


def _load(model: type[Model], file: Path, overrides: Sequence[str]) -> Model:
    try:
        config = OmegaConf.load(file)
        for key, value in _parse(overrides):
            _name_the_items(config, key)
            OmegaConf.update(config, key, value, merge=False, force_add=True)
        content = OmegaConf.to_container(config, resolve=True)
    except RecipeError:
        raise
    except (YAMLError, OmegaConfBaseException, TypeError, ValueError) as error:
        raise RecipeError(
            f"Recipe {file} cannot be read.",
            got=str(error).splitlines()[0],
            expected="YAML of `key: value` lines, and overrides such as views.num_views=4",
            do="mend that line",
        ) from error
    return check_recipe(model, content, str(file))


def check_recipe(model: type[Model], content: Any, origin: str) -> Model:
    """`content` as a `model`; every problem in it is named in one `RecipeError`."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problems = [_describe(model, problem) for problem in error.errors()]
        raise RecipeError(
            f"Recipe {origin} has {len(problems)} problem{'s' * (len(problems) > 1)}:\n  - "
            + "\n  - ".join(problems),
            do="mend these keys in the file or among the overrides",
        ) from error


def _find(path: Path) -> Path:
    shipped = SHIPPED / path.with_suffix(".yaml").name
    if path.is_file():
        return path
    if len(path.parts) == 1 and shipped.is_file():
        return shipped
    names = sorted(recipe.stem for recipe in SHIPPED.glob("*.yaml"))
    near = difflib.get_close_matches(path.stem, names, 1)
    raise RecipeError(
        "There is no such recipe.",
        got=str(path),
        expected=f"a YAML file, or one of the recipes that ship with teachercache: {', '.join(names)}",
        do=f"did you mean {near[0]}?" if near else "check the path",
    )


def _parse(overrides: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(dotted key, value read as YAML) of each override; the value replaces what the recipe has there."""
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not equals or not key.strip():
            raise RecipeError(
                "An override must have the form key=value.",
                got=repr(text),
                expected="for example views.num_views=4",
            )
        yield key, OmegaConf.select(OmegaConf.from_dotlist([text]), key)


def _name_the_items(config: Any, key: str) -> None:
    """A list of names on the way to `key` is short for a mapping of them: make it one."""
    parts = key.split(".")
    for end in range(1, len(parts)):
        above = ".".join(parts[:end])
        names = OmegaConf.select(config, above)
        if OmegaConf.is_list(names) and all(isinstance(name, str) for name in names):
            OmegaConf.update(config, above, {name: {} for name in names}, merge=False)


def _describe(model: type[BaseModel], problem: Any) -> str:
    location = problem["loc"]
    key = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        known = sorted(set(_keys(model, location[:-1])))
        near = difflib.get_close_matches(str(location[-1]), known, 1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known keys here: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{key}: this key is needed and is not there"
    return f"{key or 'recipe'}: {problem['msg'].removeprefix('Value error, ')} (got {problem['input']!r})"


def _keys(annotation: Any, location: Sequence[int | str]) -> Iterator[str]:
    """Field names of the models that `annotation` holds at `location`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if not location:
            yield from annotation.model_fields
        elif (field := annotation.model_fields.get(str(location[0]))) is not None:
            yield from _keys(field.annotation, location[1:])
    elif get_origin(annotation) in (Union, types.UnionType):
        for option in get_args(annotation):  # pydantic names the chosen option in the location
            named = bool(location) and location[0] == getattr(option, "__name__", None)
            yield from _keys(option, location[1:] if named else location)
    elif (
        isinstance(get_origin(annotation), type) and issubclass(get_origin(annotation), Mapping) and location
    ):
        yield from _keys(get_args(annotation)[1], location[1:])
