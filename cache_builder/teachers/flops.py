"""The arithmetic of a teacher, counted without its weights."""

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from teachercache.cache_builder.teachers.registry import kind_of
from teachercache.cache_builder.teachers.teacher import Teacher
from teachercache.pipeline.records.spec import TeacherSpec

_WEIGHT_PRODUCTS = (torch.ops.aten.convolution, torch.ops.aten.mm, torch.ops.aten.addmm)


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
    return kind_of(spec.model)(
        spec.model_copy(update={"pretrained": False, "checkpoint": None, "precision": "float32"})
    )
