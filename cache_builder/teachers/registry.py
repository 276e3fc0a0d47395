"""The known teachers. A new one is a row in `presets.yaml`; a new kind is a class in `_KINDS`."""

from collections import defaultdict
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib.resources import files

import yaml

from teachercache.cache_builder.teachers.grounding_dino import GroundingDinoTeacher
from teachercache.cache_builder.teachers.teacher import Teacher
from teachercache.cache_builder.teachers.timm_teacher import TimmTeacher
from teachercache.pipeline.errors import UnknownTeacherError
from teachercache.pipeline.records.spec import TeacherSpec
from teachercache.pipeline.records.strict import Strict

_OF_A_PASS = (
    *("model", "pretrained", "checkpoint", "random_seed", "precision"),
    *("image_size", "render_size", "mean", "std"),
)
_KINDS: tuple[type[Teacher], ...] = (TimmTeacher, GroundingDinoTeacher)


class Preset(Strict):
    """A row of `presets.yaml`. Views are rendered at `longest_side` pixels, or their own size if it is None.

    With `shortest_side`, the smaller of the two sizes counts. `block_indices`: the default for recipes.
    """

    model: str
    longest_side: int | None = None
    shortest_side: int | None = None
    block_indices: tuple[int, ...] | None = None


@cache
def presets() -> dict[str, Preset]:
    rows = yaml.safe_load(
        files("teachercache.cache_builder.teachers").joinpath("presets.yaml").read_text("utf-8")
    )
    return {name: Preset.model_validate(row) for name, row in rows.items()}


def find_preset(name: str) -> Preset:
    """The preset `name`. Raises `UnknownTeacherError`."""
    if name not in presets():
        raise _unknown("preset", name)
    return presets()[name]


def find_model(model: str) -> Preset:
    """A model as a preset, from its row if it has one. Raises `UnknownTeacherError`."""
    complete = kind_of(model).describe(model).model
    return next((row for row in presets().values() if row.model == complete), Preset(model=complete))


def kind_of(model: str) -> type[Teacher]:
    """The class that builds `model`. Raises `UnknownTeacherError`."""
    for kind in _KINDS:
        if model in kind.models():
            return kind
    raise _unknown("teacher", model)


def passes(specs: Mapping[str, TeacherSpec]) -> list[list[str]]:
    """The teachers that one forward pass serves, first the one whose pass it is, which goes as far as any."""
    groups = defaultdict[object, list[str]](list)
    for name in sorted(specs, key=lambda name: specs[name].block_indices[-1], reverse=True):
        shared = tuple(getattr(specs[name], field) for field in _OF_A_PASS)
        shares = any(specs[name].model in kind.models() for kind in _KINDS if kind.shares_passes)
        groups[shared if shares else name].append(name)
    return list(groups.values())


def _unknown(what: str, name: str) -> UnknownTeacherError:
    models = {model for kind in _KINDS for model in kind.models()}
    near = [
        f"{label} {', '.join(matches)}"
        for label, names in (("preset", presets()), ("model", models))
        if (matches := get_close_matches(name, names))
    ]
    return UnknownTeacherError(
        f"There is no {what} of this name.",
        got=repr(name),
        expected=f"nearest: {'; '.join(near)}"
        if near
        else f"a preset ({', '.join(presets())}) or a timm model",
        do="correct the name, or give `preset:` or `model:` (any timm model, with or without its tag)",
    )
