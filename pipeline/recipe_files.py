"""Recipes: a YAML file that completely states a run, `key.sub=value` overrides, and a checked model.

`load_recipe(BuildRecipe, "imagenet.yaml", ["views.num_views=4"])` → `BuildRecipe`. An unknown key is
an error that names the nearest known one.

YAML does not read `on`, `1e3`, `0x10`, `010` or `a: b` as text. The model knows what a key holds, so all but
null is text until it asks: every scalar in a file, everything after the `=` in an override.
"""

import difflib
import logging
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc
from pydantic import BaseModel, ValidationError
from yaml.constructor import ConstructorError

from teachercache.pipeline.errors import RecipeError

log = logging.getLogger(__name__)
Model = TypeVar("Model", bound=BaseModel)
_variables: ContextVar[set[str] | None] = ContextVar("variables", default=None)


_HINTS = {"int_parsing": "; write it in digits, as 1000", "float_parsing": "; infinity is written inf"}


class _TextLoader(yaml.SafeLoader):
    """Reads every scalar but null as text, and no key twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in known if tag.endswith((":null", ":merge"))]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node, names = super().compose_mapping_node(anchor), set[str]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in names:
                raise ConstructorError(None, None, f"found duplicate key {key.value}", key.start_mark)
            names.add(key.value)
        return node


def load_recipe(
    model: type[Model], path: str | Path, overrides: Sequence[str] = (), shipped: Path | None = None
) -> Model:
    """The recipe at `path` (or in the folder `shipped`, by name) with overrides applied.

    Logs the names, not the values, of the variables that it takes from the environment (`${oc.env:HOME}`):
    recipes, too, come from strangers. Raises `RecipeError`.
    """
    file, names = _find(Path(path), shipped), set[str]()
    token = _variables.set(names)
    try:
        return _load(model, file.read_bytes(), overrides, str(file))
    finally:
        _variables.reset(token)
        if names:
            log.warning("recipe %s takes from the environment: %s", path, ", ".join(sorted(names)))


def _env(name: str, *default: str | None) -> str | None:
    if (names := _variables.get()) is not None:
        names.add(name)
    return oc.env(name, *default)


# However deeply it is nested in other interpolations.
OmegaConf.register_resolver("oc.env", _env, replace=True)


def load_overrides(model: type[Model], overrides: Sequence[str], origin: str) -> Model:
    """A `model` made of overrides alone. Raises `RecipeError`."""
    return _load(model, b"", overrides, origin)


def _load(model: type[Model], text: bytes, overrides: Sequence[str], origin: str) -> Model:
    try:
        content = _TextLoader(text).get_single_data()
        if not isinstance(content, dict | None):
            return check_recipe(model, content, origin)  # which says what it is not
        config = OmegaConf.create(content or {})
        for override in overrides:
            key, value = _parse(model, override)
            _name_the_items(config, key)
            OmegaConf.update(config, key, value, merge=False, force_add=True)
        content = OmegaConf.to_container(config, resolve=True)
    except RecipeError:
        raise
    except (yaml.YAMLError, OmegaConfBaseException, TypeError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        raise RecipeError(
            f"Recipe {origin} cannot be read.",
            got=f"{error.problem}, line {mark.line + 1}" if mark else str(error).splitlines()[0],  # type: ignore[union-attr]
            expected="YAML of `key: value` lines, and overrides such as views.num_views=4",
            do="fix that line; quote text that YAML would read as something else",
        ) from error
    return check_recipe(model, content, origin)


def check_recipe(model: type[Model], content: Any, origin: str) -> Model:
    """`content` as a `model`; one `RecipeError` names every problem in it."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problems = [_describe(model, problem) for problem in error.errors()]
        raise RecipeError(
            f"Recipe {origin} has {len(problems)} problem{'s' * (len(problems) > 1)}:\n  - "
            + "\n  - ".join(problems),
            do="fix these keys in the file or in the overrides",
        ) from error


def _find(path: Path, shipped: Path | None) -> Path:
    if path.is_file():
        return path
    names = sorted(recipe.stem for recipe in shipped.glob("*.yaml")) if shipped else []
    if shipped and len(path.parts) == 1 and path.stem in names:
        return shipped / f"{path.stem}.yaml"
    near = difflib.get_close_matches(path.stem, names, 1)
    raise RecipeError(
        "There is no such recipe.",
        got=str(path),
        expected="a YAML file"
        + (f", or one of the recipes that ship with teachercache: {', '.join(names)}" if names else ""),
        do=f"did you mean {near[0]}?" if near else "check the path",
    )


def _parse(model: type[BaseModel], override: str) -> tuple[str, Any]:
    """(dotted key, value) of an override; the value replaces the recipe's."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip() or not text.strip():
        raise RecipeError(
            "An override must have the form key=value.",
            got=repr(override),
            expected="for example views.num_views=4",
            do="write key=null to leave a key unset",
        )
    location = tuple(re.split(r"\.|\[|\]\.?", key.removesuffix("]")))
    kinds = set(_annotations(model, location))
    is_text = all(map(_is_text, kinds))
    if text == "null" and (types.NoneType in kinds or not is_text):
        return key, None
    if not is_text and text.lstrip()[0] in "{[":
        with suppress(yaml.YAMLError):  # the model then says what it is not
            return key, OmegaConf.create(_TextLoader(text).get_single_data())
    if {bool, int, float} & kinds:
        return key, text.strip()
    return key, re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # text, which OmegaConf must not interpolate


def _is_text(kind: Any) -> bool:
    return kind in (str, types.NoneType) or (
        get_origin(kind) is Literal and all(isinstance(choice, str) for choice in get_args(kind))
    )


def _name_the_items(config: Any, key: str) -> None:
    """Turn a list of names on the path to `key` into the mapping that it abbreviates."""
    parts = key.split(".")
    for end in range(1, len(parts)):
        above = ".".join(parts[:end])
        names = OmegaConf.select(config, above)
        if OmegaConf.is_list(names) and all(isinstance(name, str) for name in names):
            OmegaConf.update(config, above, {name: {} for name in names}, merge=False)


def _describe(model: type[BaseModel], problem: Any) -> str:
    location = problem["loc"]
    key = ".".join(
        str(part)
        for place, part in enumerate(location)
        if not any(part in _names(kind) for kind in _annotations(model, location[:place]))
    )
    if problem["type"] == "extra_forbidden":
        models = filter(_is_model, _annotations(model, location[:-1]))
        known = sorted({name for kind in models for name in kind.model_fields})
        near = difflib.get_close_matches(str(location[-1]), known, 1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known keys here: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{key}: this required key is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "literal_error":
        known = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
        near = difflib.get_close_matches(str(problem["input"]), known, 1)
        message += f"; did you mean {near[0]}?" if near else ""
    if problem["type"] == "string_type":
        message += f'; in a file, quote text that YAML would read otherwise, {location[-1]}: "…"'
    message += _HINTS.get(problem["type"], "")
    whole = problem["type"] == "value_error" and isinstance(problem["input"], Mapping)  # names what is wrong
    return f"{key or 'recipe'}: {message}" + ("" if whole else f" (got {problem['input']!r})")


def _annotations(annotation: Any, location: Sequence[int | str]) -> Iterator[Any]:
    """The types that `annotation` allows for the value at `location`, one per option of a union."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _annotations(parts[0], location)
    elif origin in (Union, types.UnionType):
        for option in parts:  # pydantic names the chosen option in the location
            named = bool(location) and location[0] in _names(option)
            yield from _annotations(option, location[1:] if named else location)
    elif not location:
        yield annotation
    elif _is_model(annotation):
        if (field := annotation.model_fields.get(str(location[0]))) is not None:
            yield from _annotations(field.annotation, location[1:])
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        yield from _annotations(parts[1], location[1:])
    elif origin is tuple:
        yield from _annotations(parts[0], location[1:])


def _names(option: Any) -> set[Any]:
    """What pydantic calls an option of a union: its class, or the kind that tells it from the others."""
    kind = option.model_fields.get("kind") if _is_model(option) else None
    return {getattr(option, "__name__", None), *(get_args(kind.annotation) if kind else ())}


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
