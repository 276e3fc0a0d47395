"""Verbs that say what there is to choose from: recipes, presets, codecs, and the keys of a recipe."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from teachercache.jobs.cli.terminal import console

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo


def recipes() -> None:
    """The recipes that ship, of builds and of trainings. Each file says hardware, hours and metric.

    Example: `teachercache recipes`
    """
    from teachercache.jobs.recipes import SHIPPED, verb_of

    table = Table("recipe", "for", "what it states")
    for file in sorted(SHIPPED.glob("*.yaml"), key=lambda file: (verb_of(file) or "", file.stem)):
        table.add_row(file.stem, verb_of(file), file.read_text("utf-8").splitlines()[0].lstrip("# "))
    console.print(table)
    console.print(f"They lie in {SHIPPED}: copy one to start your own.")


def presets() -> None:
    """The teachers that have a name of their own; `teachers.NAME.model` takes any ViT of timm.

    Example: `teachercache presets`
    """
    from teachercache.cache_builder.teachers.registry import presets

    table = Table("preset", Column("model", overflow="fold"), "sees views at")
    for name, preset in presets().items():
        sides = [str(side) for side in (preset.shortest_side, preset.longest_side) if side]
        table.add_row(name, preset.model, f"{' to '.join(sides)} pixels" if sides else "their own size")
    console.print(table)


def codecs() -> None:
    """How features are stored, in how many bits; docs/codecs.md says what each loses and costs.

    Example: `teachercache codecs`
    """
    from teachercache.pipeline.codecs import codec_names, get_codec

    levels, grid, width = 4, (24, 24), 1024
    table = Table("codec", "standing", "bits a number", "learns its tables from the features")
    for name in codec_names():
        codec = get_codec(name)
        row_bytes = sum(layout.row_nbytes for layout in codec.layout(levels, grid, width).values())
        bits = 8 * row_bytes / (levels * grid[0] * grid[1] * width)
        table.add_row(name, codec.standing, f"{bits:.2f}", "yes" if codec.needs_tables else "no")
    console.print(table)


def help_keys(
    kind: Annotated[Literal["build", "train", "train-decoders"], typer.Argument(help="The kind of recipe.")],
    part: Annotated[str, typer.Argument(metavar="[KEY]", help="Only this key and those below it.")] = "",
) -> None:
    """Every key of a recipe, with its type, its default and what it means.

    Example: `teachercache help-keys build views`
    """
    from teachercache.cache_builder.build_recipe import BuildRecipe
    from teachercache.pipeline.errors import RecipeError
    from teachercache.student.training.decoder_recipe import DecoderRecipe
    from teachercache.student.training.train_recipe import TrainRecipe

    models: dict[str, type[BaseModel]]
    models = {"build": BuildRecipe, "train": TrainRecipe, "train-decoders": DecoderRecipe}
    rooms = [
        (path, room, [(f"{path}.{name}".lstrip("."), field) for name, field in room.model_fields.items()])
        for path, room in _rooms(models[kind])
    ]
    if part not in {"", *(key for _, _, keys in rooms for key, _ in keys), *(path for path, _, _ in rooms)}:
        known = ", ".join(dict.fromkeys(path for path, _, _ in rooms if path))
        raise RecipeError("There is no such key.", got=part, expected=known, do="name one, or a key below it")
    for path, room, keys in rooms:
        is_shown = f"{path}.".startswith(part and f"{part}.")
        if is_shown:
            console.print(f"\n{path or f'A recipe for {kind}'}", style="bold")
            console.print(inspect.cleandoc(room.__doc__ or ""))
        for key, field in keys if is_shown else [one for one in keys if one[0] == part]:
            console.print(Text.assemble((key, "bold"), "  ", _type(field.annotation), _default(field)))
            console.print(Padding(_sentence(field), (0, 0, 0, 4), expand=False), soft_wrap=False)


def _rooms(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """A model and those below it, each with the key that it stands at."""
    yield path, model
    for name, field in model.model_fields.items():
        key = f"{path}.{name}" if path else name
        for below, marker in _models(field.annotation):
            yield from _rooms(below, key + marker)


def _models(annotation: Any) -> Iterator[tuple[type[BaseModel], str]]:
    """The models in an annotation; those of a mapping stand below a NAME."""
    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, ""
    marker = ".NAME" if get_origin(annotation) is dict else ""
    for part in get_args(annotation) if get_origin(annotation) is not Literal else ():
        yield from ((model, marker + below) for model, below in _models(part))


def _sentence(field: FieldInfo) -> str:
    """What a key means: its own description, or the first paragraph of the keys below it."""
    below = [inspect.getdoc(model) or "" for model, _ in _models(field.annotation)]
    return field.description or " ".join(below[0].partition("\n\n")[0].split())


def _type(annotation: Any) -> str:
    """As one would write it in a recipe."""
    origin, parts = get_origin(annotation), [part for part in get_args(annotation) if part is not ...]
    if origin is Annotated:
        return _type(parts[0])
    if origin is dict:
        return f"NAME: {_type(parts[1])}"
    if parts:
        words = dict.fromkeys(map(str if origin is Literal else _type, parts))
        return (
            " | ".join(words)
            if origin in (Literal, Union, types.UnionType)
            else f"list of {', '.join(words)}"
        )
    if annotation is type(None):
        return "null"
    return "keys below" if list(_models(annotation)) else getattr(annotation, "__name__", str(annotation))


def _default(field: FieldInfo) -> str:
    from pydantic import BaseModel

    if field.is_required():
        return ", must be given"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        return ""
    if isinstance(default, tuple):
        return f" = [{', '.join(map(str, default))}]"
    return f" = {'null' if default is None else str(default).lower()}"
