"""What a training run will cost, before anything runs."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from teachercache.pipeline.records.strict import Size
from teachercache.student.models.lora import merge_lora
from teachercache.student.models.student import Student, StudentOutput, TeacherFacts
from teachercache.student.training.decoder_recipe import DecoderRecipe
from teachercache.student.training.student_recipe import StudentRecipe
from teachercache.student.training.train_decoders import decoders_of, sources_of, steps_per_epoch
from teachercache.student.training.train_recipe import TrainRecipe


class StudentSize(NamedTuple):
    """`parameters`: by part. `num_parameters`: of those that predicting takes; `trained`: of those that
    learn, low-rank updates included. `gmacs_by_part`: 10⁹ multiply-accumulates of a view forward, by what
    runs; `attention_gmacs`, of the products of queries, keys and values, are among them, and SAK's Table 22
    leaves them out. `train_gmacs`: forward and backward.
    """

    parameters: dict[str, int]
    num_parameters: int
    trained: int
    gmacs_by_part: dict[str, float]
    attention_gmacs: float
    train_gmacs: float

    @property
    def gmacs(self) -> float:
        return sum(self.gmacs_by_part.values())


@dataclass(frozen=True)
class TrainPlan:
    """`row_bytes`: what is read of the cache for one view; 0 where its features are left unread.
    `tflops_per_gpu`: what a GPU sustains. `inputs`: by decoder its data set, and how many images it has.

    Hours are those of the arithmetic: optimizer, losses and small kernels come on top."""

    steps: int
    images_per_step: int
    size: StudentSize
    image_size: Size
    row_bytes: int
    processes: int
    tflops_per_gpu: float
    inputs: Mapping[str, tuple[str, int]] = field(default_factory=dict)

    @property
    def images(self) -> int:
        return self.steps * self.images_per_step

    @property
    def gpu_hours(self) -> float:
        flops = 2e9 * self.size.train_gmacs * self.images
        return flops / (self.tflops_per_gpu * 1e12) / 3600

    @property
    def hours(self) -> float:
        return self.gpu_hours / self.processes

    @property
    def images_per_s(self) -> float:
        """Over all processes, when the GPUs never wait."""
        return self.images / (3600 * self.hours)

    @property
    def read_bytes_per_s(self) -> float:
        """What the cache must be read with for that."""
        return self.images_per_s * self.row_bytes


def make_train_plan(
    recipe: TrainRecipe,
    student: Student,
    teachers: Mapping[str, TeacherFacts],
    *,
    num_samples: int,
    row_bytes: int,
    processes: int,
    tflops_per_gpu: float,
) -> TrainPlan:
    """The plan of `recipe` with `student` (`first_student`, blank) on `num_samples` samples, whose rows take
    `row_bytes`; needs no weights. Raises `RecipeError` for a warm-up that is as long as the run."""
    images_per_step = recipe.images_per_step(processes)
    reads = (recipe.distills or student.reads_features) and recipe.reads_cache
    size = student_size(recipe.student, student, teachers, distills=recipe.distills)
    if recipe.distillation.weighting == "famo":  # which looks at each batch again
        size = size._replace(train_gmacs=size.train_gmacs + size.gmacs)
    return TrainPlan(
        steps=recipe.schedule.steps(num_samples / images_per_step)[0],
        images_per_step=images_per_step,
        size=size,
        image_size=student.image_size,
        row_bytes=row_bytes if reads else 0,
        processes=processes,
        tflops_per_gpu=tflops_per_gpu,
    )


def of_all_inputs(plans: Sequence[TrainPlan], student: StudentSize) -> TrainPlan:
    """The plan of a run whose steps take a batch of each input: what is of a view is a mean over images."""
    images = [plan.images_per_step for plan in plans]

    def mean(values: Iterable[float]) -> float:
        return sum(value * count for value, count in zip(values, images, strict=True)) / sum(images)

    sizes = [plan.size for plan in plans]
    parts = {
        part: mean(size.gmacs_by_part.get(part, 0.0) for size in sizes) for part in sizes[0].gmacs_by_part
    }
    student = student._replace(
        gmacs_by_part=parts,
        attention_gmacs=mean(size.attention_gmacs for size in sizes),
        train_gmacs=mean(size.train_gmacs for size in sizes),
    )
    row_bytes = round(mean(plan.row_bytes for plan in plans))
    return replace(plans[0], images_per_step=sum(images), size=student, row_bytes=row_bytes)


def make_decoder_plan(recipe: DecoderRecipe, *, processes: int, tflops_per_gpu: float) -> TrainPlan:
    """Asks all that `train_decoders` asks, and raises as it does; runs the student and each decoder once.

    GMACs are of an image, as a mean over those of a step, each counted thrice where it learns; losses, noisy
    queries and deformable sampling are not among them.
    """
    sources = sources_of(recipe, 0, processes, torch.device("cpu"))
    decoders = decoders_of(recipe, sources).eval()
    forward, student = dict.fromkeys(["student", *sources], 0.0), decoders.student
    for (name, source), images in zip(sources.items(), recipe.batch_sizes, strict=True):
        share = images / sum(recipe.batch_sizes) / 2e9
        with torch.no_grad(), FlopCounterMode(display=False) as shared:
            features = decoders.represent(source.blank)
        with torch.no_grad(), FlopCounterMode(display=False) as own:
            decoders.decoders[name].predict(features, decoders.image_size)
        forward["student"] += share * shared.get_total_flops()
        forward[name] = share * own.get_total_flops()
    modules = {"student": student or nn.Module(), **decoders.decoders}
    parameters = {part: sum(one.numel() for one in module.parameters()) for part, module in modules.items()}
    trained = sum(one.numel() for one in decoders.parameters() if one.requires_grad)
    thrice = {
        part: gmacs * (3 if part != "student" or recipe.learns else 1) for part, gmacs in forward.items()
    }
    return TrainPlan(
        steps=recipe.schedule.steps(steps_per_epoch(sources))[0],
        images_per_step=recipe.images_per_step(processes),
        size=StudentSize(parameters, sum(parameters.values()), trained, forward, 0.0, sum(thrice.values())),
        image_size=decoders.image_size,
        row_bytes=0,
        processes=processes,
        tflops_per_gpu=tflops_per_gpu,
        inputs={name: (one.dataset.name, one.facts["samples"]) for name, one in sources.items()},
    )


def student_size(
    recipe: StudentRecipe, student: Student, teachers: Mapping[str, TeacherFacts], *, distills: bool
) -> StudentSize:
    """The size of a run's blank student.

    All matrix products and convolutions are counted, and backward as it runs: what is frozen costs no more
    than the gradients that pass through it.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        pixels_B3HW = torch.empty(1, 3, *student.image_size)
        output = student.eval()(pixels_B3HW, full=True, maps=distills, **recipe.blank_inputs(teachers))
        gmacs, attention_gmacs = _by_part(counter)
        if isinstance(output, StudentOutput):
            levels = {name: facts.num_levels for name, facts in teachers.items() if distills}
            output = output.predictions, [output.feature_maps[name][-n:] for name, n in levels.items()]
        torch.stack([tensor.sum() for tensor in _learning(output)]).sum().backward()
    trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    train_gmacs = counter.get_total_flops() / 2e9
    merge_lora(student)
    parameters, count = student.parameters_by_part(), student.num_parameters
    return StudentSize(parameters, count, trained, gmacs, attention_gmacs, train_gmacs)


_RUNS = {
    "stem": r"stem",
    "spatial prior": r"vit_adapter\.prior",
    "interactions": r"vit_adapter\.(injectors\.\d+|extractors\.\d+\.\d+)",  # between the stem's blocks
    "projections": r"latent_space\.(s2t|t2s|rec)\.[^.]+",
    "adapter paths": r"paths\.[^.]+",
    "aligners": r"(paths\.[^.]+\.)?aligners\.([^.]+\.)?\d+",
    "heads": r"decoder\.heads\.[^.]+",
}


def _by_part(counter: FlopCounterMode) -> tuple[dict[str, float], float]:
    """(10⁹ multiply-accumulates of what has run, those of the stem's attention among them)."""
    counts = counter.get_flop_counts()
    parts = dict.fromkeys(_RUNS, 0.0)
    attention = 0.0
    for module, flops in counts.items():
        _, _, name = module.partition(".")
        for part, pattern in _RUNS.items():
            if re.fullmatch(pattern, name):
                parts[part] += sum(flops.values()) / 2e9
        if name == "stem":
            attention += sum(n for op, n in flops.items() if re.search("bmm|attention", str(op))) / 2e9
    parts["stem"] -= parts["interactions"]
    rest = counter.get_total_flops() / 2e9 - sum(parts.values())
    return {part: n for part, n in (parts | {"routers and other": rest}).items() if n > 1e-9}, attention


def _learning(output: Any) -> Iterator[Tensor]:
    """The tensors with a gradient, however nested in mappings and sequences."""
    if isinstance(output, Tensor):
        if output.requires_grad:
            yield output
    elif output is not None:
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _learning(part)
