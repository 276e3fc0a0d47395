"""The known teachers: a new one is a row in `presets.yaml`, a new kind is a class in `_KINDS`.

Also which of them share a forward pass, and the arithmetic of a pass, counted without weights.
"""

from collections import defaultdict
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Any

import torch
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

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
_WEIGHT_PRODUCTS = (torch.ops.aten.convolution, torch.ops.aten.mm, torch.ops.aten.addmm)


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


def find_preset(name: str, preset: str | None, model: str | None) -> Preset:
    """By `preset` or `model`, or else by the teacher's own `name`, which may be of either.

    A model has the row of a preset if there is one. Raises `UnknownTeacherError`.
    """
    if preset or (not model and name in presets()):
        if (found := presets().get(preset or name)) is None:
            raise _unknown("preset", preset or name)
        return found
    complete = kind_of(model or name).describe(model or name).model
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


def teacher_gmacs(spec: TeacherSpec) -> float:
    """10⁹ multiply-accumulates of one view, in the convention of fvcore and of SAK's Table 21.

    Products with weights count: convolutions and linear layers, up to the last block that is tapped.
    Products of fused attention do not, as in fvcore; they would add 12% to DINOv2-L at 378² (221 → 247)
    and 14% to SAM-L at 1024² (1308 → 1489).
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        _blank(spec)(torch.empty(1, 3, *spec.render_size, dtype=torch.uint8))
    flops: dict[Any, int] = counter.get_flop_counts()["Global"]
    return sum(flops.get(product, 0) for product in _WEIGHT_PRODUCTS) / 2e9


def teacher_parameters(spec: TeacherSpec) -> int:
    """Parameters up to the last block that is tapped, without final norm, neck or classifier (Table 21)."""
    with torch.device("meta"):
        teacher = _blank(spec)
        ran = set[nn.Module](module for module in teacher.children())  # by name, they trigger no hook
        for module in teacher.modules():
            module.register_forward_hook(lambda module, *_: ran.add(module))
        teacher(torch.empty(1, 3, *spec.render_size, dtype=torch.uint8))
    return sum(parameter.numel() for module in ran for parameter in module.parameters(recurse=False))


def _blank(spec: TeacherSpec) -> Teacher:
    blank = {"pretrained": False, "checkpoint": None, "precision": "float32"}
    return kind_of(spec.model)(spec.model_copy(update=blank))


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
