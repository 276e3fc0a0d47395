"""What a run says at its start: where its cache and its recipe make it another run than it may seem."""

from __future__ import annotations

from collections.abc import Sequence

from teachercache.pipeline.records.spec import CacheSpec
from teachercache.student.training.train_recipe import TrainRecipe


def notices(recipe: TrainRecipe, spec: CacheSpec, cached: Sequence[str]) -> list[str]:
    """One line each; `cached` are the teachers whose features are read."""
    found = []
    if recipe.multitask and not spec.views.policy.startswith("multitask_"):
        found.append(
            f"The cache has {spec.views.policy} views: labels are learnt on those, and not on the ones of"
            " stage 2, multitask_train."
        )
    if recipe.student.kind == "kpu":
        without = [name for name in cached if not spec.teachers[name].cls_token]
        if without and len(without) == len(cached):
            found.append(
                f"No class token of {', '.join(without)} is cached, so the image's feature learns nothing:"
                " build with teachers.NAME.cls_token=true."
            )
    finer = [name for name in cached if _is_finer(spec, name)]
    if recipe.distills and finer:
        wanted = recipe.distillation
        inexact = ["smooth-L1"] if wanted.distance == "smooth_l1" and wanted.distance_weight else []
        inexact += ["the cosine of tokens"] if wanted.cosine == "token" and wanted.cosine_weight else []
        if inexact:
            found.append(
                f"On the adjoint grid of {', '.join(finer)} {' and '.join(inexact)} "
                f"{'are approximations' if len(inexact) > 1 else 'is an approximation'}: exact are"
                " distillation.cosine=flattened with distillation.distance=squared_error, or native grids."
            )
    return found


def _is_finer(spec: CacheSpec, name: str) -> bool:
    """Whether the teacher's own grid says more than its adjoint."""
    teacher = spec.teachers[name]
    pairs = zip(teacher.native_grid, teacher.stored_grid, strict=True)
    return teacher.grid.kind == "adjoint" and any(own > stored for own, stored in pairs)
