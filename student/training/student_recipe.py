"""`StudentRecipe`: a student and how it is trained. Each kind has its own keys, and says what of a run and of
a cache it cannot work with. `first_student`: the one that a run starts with."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from inspect import signature
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, get_args

import torch
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from teachercache.pipeline.errors import RecipeError
from teachercache.pipeline.records.spec import TeacherSpec
from teachercache.pipeline.records.strict import Size, Strict
from teachercache.student.build import build_student
from teachercache.student.kpu.latent_space import Features
from teachercache.student.kpu.vit_adapter import NormKind
from teachercache.student.losses.alignment import AlignmentLoss
from teachercache.student.losses.distillation import DistillationLoss
from teachercache.student.models.heads import HeadKind
from teachercache.student.models.lora import add_lora
from teachercache.student.models.student import NUM_LEVELS, Student, TeacherFacts
from teachercache.student.models.task_decoder import Fusion
from teachercache.student.sak.model import SAK
from teachercache.student.sak.transfer import grow, load_stage_1
from teachercache.student.training.objectives import KPUObjective, SakObjective

if TYPE_CHECKING:
    from teachercache.student.training.train_recipe import TrainRecipe

Specs = Mapping[str, TeacherSpec]
Facts = Mapping[str, TeacherFacts]
Errors = Iterator[RecipeError]
AtHome = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path that may begin with ~; the rest, a name on the Hub too, stays as it was typed."""
_WHOLE_STEM = {"stem", "stem.vit"}
_OTHER_LEVELS = f"build the cache with {NUM_LEVELS} block_indices for it, or leave it out of `teachers`"


class StudentRecipe(Strict):
    """What students of all kinds have: arguments of `build_student` (the cache and the data set give the
    others), and how they are trained.

    Without tasks, the student of `init_from` keeps its own `stem`, `reduction` and `adapter_paths` (SAK,
    D.4). `freeze` is that of Table 12.
    """

    loss: ClassVar[Any] = DistillationLoss
    objective: ClassVar[Any] = SakObjective
    takes_inputs: ClassVar[bool] = False
    takes_cutmix: ClassVar[bool] = False

    kind: str
    stem: str | None = Field("vit_base_patch16_384", description="A ViT of timm; null: none, in an amalgam.")
    pretrained: bool = Field(True, description="Start the stem with trained weights.")
    init_from: AtHome | None = Field(
        None,
        description="A saved student: with tasks its stem and paths; else it goes on, with new teachers.",
    )
    freeze: tuple[str, ...] = Field((), description="Parts that are not trained, such as stem and paths.")
    lora_rank: int | None = Field(None, ge=1, description="Train the stem, itself frozen, by updates of it.")
    compile: bool | None = Field(None, description="torch.compile; null: on GPUs. Last bits then differ.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if found := list(self.contradictions()):
            raise ValueError("; ".join(found))
        return self

    def contradictions(self) -> Iterator[str]:
        """Why these keys cannot stand together."""
        if self.stem is None:
            yield "only an amalgam can be without a stem: name a timm ViT in stem"
        if self.lora_rank and _WHOLE_STEM & set(self.freeze):
            yield "lora_rank trains the stem, and freeze keeps it: leave out one of the two"

    def contradictions_of(self, run: TrainRecipe) -> Iterator[str]:
        """Why `run` cannot train such a student."""
        of_a_kind = {"image_weight", "reconstruction_weight"}
        said = run.distillation.model_dump(include=of_a_kind, exclude_defaults=True)
        if foreign := said.keys() - signature(self.loss).parameters:
            yield f"{', '.join(sorted(foreign))}: only a kpu has such weights, leave them out"
        if run.inputs and not self.takes_inputs:
            yield "only a kpu sees images of several sizes: leave out inputs"

    def requirements(self, teachers: Specs) -> Errors:
        """What a cache with these teachers lacks."""
        for name, spec in teachers.items():
            if spec.num_levels > NUM_LEVELS:
                yield RecipeError(
                    f"Teacher {name} cannot be distilled with its levels.",
                    got=f"{spec.num_levels} levels in the cache",
                    expected=f"at most {NUM_LEVELS}, as the student has; fewer go to its last ones",
                    do=_OTHER_LEVELS,
                )

    def notices(self, cached: Specs) -> Iterator[str]:
        """What to say of a run that reads the features of these teachers."""
        yield from ()

    def arguments(self, teachers: Facts) -> dict[str, Any]:
        """Those of `build_student` that follow from these keys and the teachers."""
        own = self.model_dump(exclude={"init_from", "freeze", "lora_rank", "compile"})
        return own | {"teacher_dims": {name: teacher.width for name, teacher in teachers.items()}}

    def blank_inputs(self, teachers: Facts) -> dict[str, Any]:
        """What `forward` takes in training beside the pixels of one view: empty tensors."""
        return {}


class _TaskRecipe(StudentRecipe):
    """Of students that learn tasks. A cache's recipe has `sak_compat` for its teachers."""

    sak_compat: bool = Field(False, description="Feed the stem ImageNet's statistics, as the authors do.")
    fusion: Fusion = Field("mor", description="How maps become one: by a router, summed or side by side.")
    decoder: HeadKind = Field("simple", description="The head of each task.")


class SakRecipe(_TaskRecipe):
    """SAK's student."""

    takes_cutmix = True

    kind: Literal["sak"] = Field("sak", description="SAK's student.")
    reduction: int = Field(4, ge=1, description="By how much an adapter path is narrower than the stem.")
    adapter_paths: bool = Field(True, description="A path for each teacher; false: SAK's Table 3, row 1.")


class KpuRecipe(StudentRecipe):
    """KPU's student; the switches are those of its Table 2. With `norm: sync_batch` it depends on how a batch
    is divided."""

    loss = AlignmentLoss
    objective = KPUObjective
    takes_inputs = True

    kind: Literal["kpu"] = Field("kpu", description="KPU's student, whose stem is the sentinel.")
    preservation: bool = Field(True, description="Keep the sentinel as it is, beside a ViT-Adapter.")
    unification: bool = Field(True, description="Align teachers in one space.")
    reconstruction: bool = Field(True, description="Give teachers back from that space.")
    norm: NormKind = Field("group", description="Norms of the ViT-Adapter; original: sync_batch.")

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.norm != "group" and not self.preservation:
            yield "only a ViT-Adapter has such a norm: leave out norm or set preservation=true"
        if self.lora_rank and self.preservation:
            yield "a kpu keeps its sentinel as it is: leave out lora_rank or set preservation=false"
        if self.init_from:
            yield "a kpu starts from its sentinel's own weights: set student.init_from=null"
        if self.reconstruction and not self.unification:
            yield "reconstruction needs unification's space: set student.reconstruction=false too"

    def contradictions_of(self, run: TrainRecipe) -> Iterator[str]:
        yield from super().contradictions_of(run)
        if run.multitask is not None:
            yield "a kpu represents and learns no tasks: leave out multitask, or choose kind sak"

    def requirements(self, teachers: Specs) -> Errors:
        yield from _without_maps(teachers)

    def notices(self, cached: Specs) -> Iterator[str]:
        if cached and not any(spec.cls_token for spec in cached.values()):
            yield (
                f"No class token of {', '.join(cached)} is cached, so the image's feature learns nothing:"
                " build with teachers.NAME.cls_token=true."
            )

    def arguments(self, teachers: Facts) -> dict[str, Any]:
        return super().arguments(teachers) | {
            "teacher_grids": {name: teacher.grid for name, teacher in teachers.items()},
            "class_tokens": [name for name, teacher in teachers.items() if teacher.cls_token],
            "image_sizes": {name: one.image_size for name, one in teachers.items() if one.image_size},
        }

    def blank_inputs(self, teachers: Facts) -> dict[str, Any]:
        features = {
            name: Features(torch.empty(1, width) if cls_token else None, torch.empty(1, width, *grid))
            for name, (width, grid, cls_token, *_) in teachers.items()
        }
        return {"teachers": features}


class AmalgamRecipe(_TaskRecipe):
    """Tasks learnt on the teachers' features themselves (SAK, Tables 12 and 19), beside a `stem` or alone."""

    kind: Literal["amalgam"] = Field("amalgam", description="Tasks on the teachers' own features.")

    def contradictions(self) -> Iterator[str]:
        if self.stem is not None:
            yield from super().contradictions()
        elif self.lora_rank:
            yield "lora_rank trains the stem, and stem is null: leave out lora_rank"
        if self.init_from:
            yield "an amalgam starts from its stem's own weights: set student.init_from=null"

    def contradictions_of(self, run: TrainRecipe) -> Iterator[str]:
        yield from super().contradictions_of(run)
        if run.distills or run.multitask is None:
            yield "an amalgam has nothing to distil: set multitask and distillation.weight=0"

    def requirements(self, teachers: Specs) -> Errors:
        yield from unfit_experts(teachers)

    def blank_inputs(self, teachers: Facts) -> dict[str, Any]:
        features = {
            name: torch.empty(1, NUM_LEVELS, *grid, width) for name, (width, grid, *_) in teachers.items()
        }
        return {"features": features}


def unfit_experts(teachers: Specs, levels: Collection[int] = (NUM_LEVELS,)) -> Errors:
    """What keeps an amalgam, or decoders, from working on the cached features of these teachers, which have
    all as many `levels` as the first."""
    yield from _without_maps(teachers)
    wanted = next((spec.num_levels for spec in teachers.values() if spec.num_levels in levels), NUM_LEVELS)
    for name, spec in teachers.items():
        if spec.num_levels != wanted:
            yield RecipeError(
                f"Teacher {name} cannot be an expert: an expert needs one map at each level.",
                got=f"{spec.num_levels} levels in the cache",
                expected=str(wanted),
                do=_OTHER_LEVELS,
            )


def _without_maps(teachers: Specs) -> Errors:
    """The teachers whose own maps are not cached.

    The adjoint grid holds what a map on the student's grid can reach of them, which is all that SAK's losses
    need; for a student that works on features it would not be what online teachers give.
    """
    for name, spec in teachers.items():
        if spec.grid.kind == "adjoint":
            yield RecipeError(
                f"This student works on the teachers' own maps, and those of {name} are not in the cache.",
                got="grid: adjoint in the cache",
                expected="grid: native or bilinear",
                do="build a cache of these images with such a grid",
            )


def _of_its_kind(value: Any) -> Any:
    """Keys with their kind, which is "sak" where none is stated, and without those of others that are null.

    Raises `ValueError` for a key that only students of another kind have, whatever its value.
    """
    if not isinstance(value, dict):
        return value
    value = {"kind": "sak"} | value
    kinds = {kind.model_fields["kind"].default: kind for kind in get_args(AnyStudent)}
    if value["kind"] not in list(kinds):
        return value
    known = {key for kind in kinds.values() for key in kind.model_fields}
    foreign = known - kinds[value["kind"]].model_fields.keys()
    if said := sorted(key for key in foreign & value.keys() if value[key] is not None):
        raise ValueError(f"a student of kind {value['kind']} has no {', '.join(said)}: leave it out")
    return {key: one for key, one in value.items() if key not in foreign}


AnyStudent = SakRecipe | KpuRecipe | AmalgamRecipe
StudentOfAKind = Annotated[AnyStudent, Field(discriminator="kind"), BeforeValidator(_of_its_kind)]


_KEPT = {"stem", "reduction", "adapter_paths", "sak_compat"}  # by a student that goes on


def first_student(
    wanted: StudentRecipe,
    teachers: Mapping[str, TeacherFacts],
    image_size: Size,
    tasks: Mapping[str, int] | None,
    *,
    distills: bool,
    blank: bool = False,
) -> Student:
    """The student that a run starts with: new, new on the weights of stage 1, or one that goes on; with
    `requires_grad` exactly where it learns.

    `tasks`: name → output channels, None for stage 1. Without `distills` nothing is trained that distillation
    alone needs. `blank`: without weights, on the device "meta", to be asked and counted.
    Raises `RecipeError` for what cannot be built or learns nothing, `CheckpointError` where `init_from` holds
    no student that fits.
    """
    with torch.device("meta") if blank else nullcontext():
        if wanted.init_from and tasks is None:
            saved = SAK.from_pretrained(wanted.init_from, weights=not blank)
            _require_kept(wanted, saved)
            grow(saved, {name: facts.width for name, facts in teachers.items()}, image_size)
            student: Student = saved
        else:
            arguments = wanted.arguments(teachers) | {"image_size": image_size, "tasks": tasks}
            arguments["pretrained"] = wanted.pretrained and not (wanted.init_from or blank)
            student = build_student(**arguments)
            if wanted.init_from and not blank:
                assert isinstance(student, SAK)
                load_stage_1(student, wanted.init_from)
        if wanted.lora_rank:
            stem = student.get_submodule("stem")
            if not any(parameter.requires_grad for parameter in stem.parameters()):
                raise RecipeError(
                    "A student that gets a new teacher keeps its stem, and lora_rank would train it.",
                    got=f"student.lora_rank: {wanted.lora_rank}, and a teacher that {wanted.init_from} lacks",
                    expected="no updates of the stem: the maps of its other teachers stay what they are",
                    do="set student.lora_rank=null",
                )
            add_lora(stem, wanted.lora_rank)
    for name, facts in teachers.items():
        student.keep_levels(name, facts.num_levels if distills else 0)
    student.freeze(*wanted.freeze)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise RecipeError(
            "Every part of the student is frozen.",
            got=f"student.freeze: [{', '.join(wanted.freeze)}]",
            expected="a part that is trained: " + ", ".join(name for name, _ in student.named_children()),
            do="freeze less",
        )
    return student


def _require_kept(wanted: StudentRecipe, student: Student) -> None:
    """Raises `RecipeError` where the recipe says otherwise what a student that goes on keeps."""
    said = wanted.model_dump(include=_KEPT & wanted.model_fields_set)
    if others := [key for key in said if said[key] != student.config[key]]:
        raise RecipeError(
            f"The recipe differs from the student in {wanted.init_from}, which continues unchanged.",
            got=", ".join(f"student.{key}: {said[key]}" for key in others),
            expected=", ".join(f"student.{key}: {student.config[key]}" for key in others),
            do="state the student's own, or set student.init_from=null for a new student",
        )
