"""`TrainRecipe`: what a training run is."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from teachercache.pipeline.crops import StudentJitter
from teachercache.pipeline.errors import RecipeError
from teachercache.pipeline.records.strict import Strict
from teachercache.student.datasets import DatasetKind
from teachercache.student.losses.distillation import CosineKind, DistanceKind
from teachercache.student.training.student_recipe import AtHome, SakRecipe, StudentOfAKind
from teachercache.student.training.targets import FeaturesFrom, TargetKind

Weight = Annotated[float, Field(ge=0)]
Tracker = Literal[
    "tensorboard", "wandb", "mlflow", "aim", "comet_ml", "clearml", "dvclive", "swanlab", "trackio"
]


class DatasetRecipe(Strict):
    """A data set with labels (docs/datasets.md says how it is laid out; `fraction` is SAK's Table 18)."""

    kind: DatasetKind = Field(description="Which data set.")
    root: str = Field(description="Its folder.")
    split: str = Field("train", description="The part of it whose images and labels are learnt.")
    fraction: float = Field(1.0, gt=0, le=1, description="How much of the cache to use, as `subset` cuts it.")
    reencoded: bool = Field(False, description="The cache's images are copies in other files, as large.")


class MultiTaskRecipe(Strict):
    """Stage 2: the labels that are learnt. The cache must hold views of the data set's images."""

    dataset: DatasetRecipe
    tasks: tuple[str, ...] | None = Field(None, min_length=1, description="Tasks to learn; null: all it has.")
    weights: dict[str, Weight] = Field({}, description="Weights of the tasks' losses; else SAK's (B.5).")


class DistillationRecipe(Strict):
    """The loss between student and teachers: `DistillationLoss`, for a KPU `AlignmentLoss`. Class tokens are
    compared raw, whatever `targets` is."""

    weight: float = Field(
        1.0, ge=0, description="Weight of distillation beside tasks (γ of SAK, Eq. 6); 0 reads no features."
    )
    cosine: CosineKind | None = Field(
        None, description="Cosine of whole maps or of tokens; null: flattened for a SAK, token for a KPU."
    )
    cosine_weight: float = Field(0.9, ge=0, description="Weight of one minus the cosine.")
    distance: DistanceKind = Field("smooth_l1", description="The distance that is added to the cosine.")
    distance_weight: float = Field(0.1, ge=0, description="Weight of this distance.")
    teacher_weights: dict[str, Weight] = Field({}, description="Weight of each teacher's loss; 1 by default.")
    image_weight: float = Field(1.0, ge=0, description="Weight of class tokens; of a KPU only.")
    reconstruction_weight: float = Field(1.0, ge=0, description="Weight of reconstruction (λ of KPU).")
    weighting: Literal["equal", "famo", "teacher_drop"] = Field(
        "equal", description="How teachers count (KPU, Figure 4); famo is one more forward pass a step."
    )
    famo_lr: float = Field(0.025, gt=0, description="Learning rate of famo's weights.")
    famo_decay: float = Field(1e-3, ge=0, description="Weight decay of famo's weights.")
    drop_probability: float = Field(0.5, ge=0, le=1, description="How likely teacher_drop drops a teacher.")
    targets: TargetKind = Field("raw", description="How the cache's statistics scale maps to compare.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.weighting != "equal" and self.teacher_weights:
            raise ValueError(f"{self.weighting} weighs the teachers itself: leave out teacher_weights")
        return self


class OptimizerRecipe(Strict):
    """AdamW. Every parameter decays: the paper gives one number (Table 11), the authors' code applies it to
    all."""

    lr: float = Field(1e-3, gt=0, description="Learning rate after the warm-up.")
    weight_decay: float = Field(1e-2, ge=0, description="Decay of all weights, norms and biases too.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's two coefficients.")


class ScheduleRecipe(Strict):
    """Length of the run and of its warm-up, in epochs or in optimizer steps, and how the learning rate falls
    after it. `final_lr` is that of the authors' code; the paper does not give it."""

    kind: Literal["cosine", "poly"] = Field(
        "cosine", description="How the learning rate falls: poly is the power .9 of what is left."
    )
    epochs: float | None = Field(None, gt=0, description="Length in passes over the cache's images.")
    max_steps: int | None = Field(None, ge=1, description="Length in optimizer steps; the shorter one holds.")
    warmup_epochs: float = Field(0, ge=0, description="Length of the warm-up in epochs; or warmup_steps.")
    warmup_steps: int = Field(0, ge=0, description="Length of the warm-up in steps; or warmup_epochs.")
    final_lr: float = Field(1e-5, ge=0, description="Learning rate that a cosine falls to.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.epochs is None and self.max_steps is None:
            raise ValueError("one of epochs and max_steps is needed")
        if self.warmup_epochs and self.warmup_steps:
            raise ValueError("give warmup_epochs or warmup_steps, not both")
        return self

    def steps(self, steps_per_epoch: float) -> tuple[int, int]:
        """(all steps, those of the warm-up), in optimizer steps."""
        total = min(
            math.ceil(self.epochs * steps_per_epoch) if self.epochs else math.inf,
            self.max_steps or math.inf,
        )
        warmup = self.warmup_steps or math.ceil(self.warmup_epochs * steps_per_epoch)
        if warmup >= total:
            raise RecipeError(
                "The warm-up is not shorter than the run.",
                got=f"{warmup} steps of warm-up, {total} in all",
                expected="a warm-up that ends before the run does",
                do=f"add schedule.warmup_epochs=0 schedule.warmup_steps={total // 10:.0f}, or run longer",
            )
        return int(total), warmup

    def rate(self, step: int, peak: float, steps: tuple[int, int]) -> float:
        """The learning rate of optimizer step `step` (from 0) of a run of so many `steps`; a function of the
        step, so that a resumed run needs no scheduler's state.

        Linear to `peak`, which the last step of the warm-up has exactly, then to `final_lr`, which the step
        after the run would have. `cosine` falls by half a cosine; `poly` by (1 - t)^0.9, with the power of
        DeepLab and of the authors' code.
        """
        total, warmup = steps
        if step < warmup:
            return peak * (step + 1) / warmup
        progress = min((step - warmup) / max(1, total - warmup), 1.0)
        left = 0.5 * (1 + math.cos(math.pi * progress)) if self.kind == "cosine" else (1 - progress) ** 0.9
        return self.final_lr + (peak - self.final_lr) * left


class LoaderRecipe(Strict):
    """How each process reads."""

    kind: Literal["random", "stream"] = Field(
        "random", description="Rows in random order, or tars in sequence."
    )
    shuffle_buffer: int = Field(256, ge=1, description="Rows of each process that a stream mixes.")
    threads: int = Field(8, ge=1, description="Decode images and read features, in each process.")
    prefetch: int = Field(2, ge=1, description="Batches that are kept ready.")


class ValidationRecipe(Strict):
    """Similarity to each teacher on images that the run does not train on: those of a second cache, or a part
    of its own that their keys and the seed choose."""

    cache: str | None = Field(None, description="A cache of other images, by the same recipe.")
    images: str | None = Field(None, description="Where the images of that cache are now.")
    fraction: float | None = Field(None, gt=0, lt=1, description="Share of the run's images to hold out.")
    every_steps: int = Field(1000, ge=1, description="Steps from one comparison to the next.")
    max_samples: int = Field(1000, ge=1, description="Images to compare.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.cache is None) == (self.fraction is None):
            raise ValueError("give a cache of other images, or a fraction of the run's own")
        return self


class InputRecipe(Strict):
    """Images of their own for some teachers."""

    cache: str = Field(description="The cache of these images.")
    images: str | None = Field(None, description="Where the source images are now, if they moved.")
    teachers: tuple[str, ...] | None = Field(
        None, min_length=1, description="Its teachers to use; null: all."
    )
    batch_size_per_process: int = Field(16, ge=1, description="Images of a step, in each process.")


class RunRecipe(Strict):
    """What every run states, of a student as of decoders. `trackers` but tensorboard are to be installed."""

    output: AtHome = Field(description="The folder that the run writes, checkpoints and what it trains.")
    optimizer: OptimizerRecipe = OptimizerRecipe()
    schedule: ScheduleRecipe
    gradient_accumulation_steps: int = Field(1, ge=1, description="Batches that make up a step.")
    clip_norm: float = Field(0.0, ge=0, description="Norm that gradients are clipped to; 0: never.")
    mixed_precision: Literal["no", "bf16"] = Field("bf16", description="Precision of the forward pass.")
    seed: int = Field(0, ge=0, description="Seed of sample order, teacher dropping and new weights.")
    resume: bool = Field(True, description="Go on from the last checkpoint in output.")
    checkpoint_every_steps: int = Field(1000, ge=1, description="Steps from one checkpoint to the next.")
    keep_checkpoints: int = Field(2, ge=1, description="Checkpoints to keep, the newest.")
    log_every_steps: int = Field(50, ge=1, description="Steps from one line of the log to the next.")
    trackers: tuple[Tracker, ...] = Field(("tensorboard",), description="Logs beside the run's own file.")
    loader: LoaderRecipe = LoaderRecipe()

    makes: ClassVar[str] = "student"  # the folder in `output` of what was trained

    @property
    def saved(self) -> Path:
        return Path(self.output) / self.makes

    @property
    def checkpoint_folder(self) -> Path:
        return Path(self.output) / "checkpoints"

    @property
    @abstractmethod
    def batch_sizes(self) -> list[int]:
        """Images that a step takes of each input in a process."""

    def images_per_step(self, num_processes: int) -> int:
        """Images of one optimizer step, over all inputs and processes."""
        return sum(self.batch_sizes) * self.gradient_accumulation_steps * num_processes


_OF_AN_INPUT = ("images", "teachers", "global_batch_size", "batch_size_per_process")


class TrainRecipe(RunRecipe):
    """A training run: distillation alone (stage 1), or with `multitask` beside the labels of a data set
    (stage 2). The losses of `inputs` add up (KPU), an epoch is one of the first, and each holds out its
    `validation.fraction`. `teachers: []` trains on labels alone."""

    cache: str = Field(description="The cache to read, which decides the views and so the student's input.")
    images: str | None = Field(None, description="Where the source images are now, if they moved.")
    inputs: tuple[InputRecipe, ...] = Field((), description="Caches in place of one; a batch of each a step.")
    features: FeaturesFrom = Field(
        "cached",
        description="cached; online: all teachers run; hybrid: only those not cached; fresh: on new views.",
    )
    student_jitter: StudentJitter | None = None
    cutmix: bool = Field(False, description="Pairs of images exchange a rectangle, maps too.")
    teachers: tuple[str, ...] | None = Field(None, description="Teachers to learn from; null: all.")
    student: StudentOfAKind = Field(SakRecipe(), description="The student, with the keys of its kind.")
    distillation: DistillationRecipe = DistillationRecipe()
    multitask: MultiTaskRecipe | None = None
    global_batch_size: int | None = Field(None, ge=1, description="Images of a step; accumulation follows.")
    batch_size_per_process: int = Field(16, ge=1, description="Images at once, in each process.")
    picture_every_steps: int = Field(1000, ge=0, description="Steps from one picture to the next; 0: none.")
    validation: ValidationRecipe | None = None

    @model_validator(mode="before")
    @classmethod
    def _first_input(cls, value: Any) -> Any:
        """`cache` is that of the first input."""
        match value:
            case {"inputs": [dict() | InputRecipe() as one, *_]}:
                first = dict(one).get("cache")
            case _:
                return value
        unsaid = {key: cls.model_fields[key].default for key in _OF_AN_INPUT} | {"cache": first}
        texts = ((str(value.get(key, one)), str(one)) for key, one in unsaid.items())  # which a file has
        if any(said != default for said, default in texts):
            raise ValueError(
                "each input states cache, images, teachers and batch size: leave them out beside inputs"
            )
        return value | {"cache": first}

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = list(self.student.contradictions_of(self))
        if self.inputs and self.validation and self.validation.cache:
            problems.append("each of the inputs holds out images of its own: give validation.fraction")
        if self.cutmix and (self.multitask or not self.student.takes_cutmix):
            problems.append(
                "cutmix mixes maps, not labels or class tokens: only a sak without multitask has it"
            )
        if self.multitask is None and not self.distills:
            problems.append("without multitask, at least one teacher and distillation.weight > 0 are needed")
        if self.validation and not self.distills:
            problems.append("validation compares with teachers, and none is distilled: leave it out")
        if self.distillation.weighting != "equal" and not self.distills:
            problems.append("weighting is of teachers, and none is distilled: leave it out")
        if self.streams and self.features != "cached":
            problems.append(f"loader.kind=stream reads features=cached, got {self.features}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def each(self) -> list[Self]:
        """The run on each of its inputs alone; epochs and a warm-up by them are those of the first."""
        alone: dict[str, Any] = {"inputs": ()}
        if len(self.inputs) > 1:
            alone["distillation"] = self.distillation.model_copy(update={"teacher_weights": {}})  # of all
        at_once = {"schedule": self.schedule.model_copy(update={"warmup_epochs": 0, "warmup_steps": 0})}
        changes = [dict(one) | alone | (at_once if i else {}) for i, one in enumerate(self.inputs)]
        return [self.model_copy(update=change) for change in changes] or [self]

    @property
    def streams(self) -> bool:
        return self.loader.kind == "stream"

    @property
    def distills(self) -> bool:
        return self.distillation.weight > 0 and self.teachers != ()

    @property
    def reads_cache(self) -> bool:
        return self.features in ("cached", "hybrid")

    @property
    def fraction(self) -> float:
        """Of the cache's samples."""
        return self.multitask.dataset.fraction if self.multitask else 1.0

    @property
    def held_out(self) -> float:
        """Of the cache's samples, those that are never trained on."""
        return (self.validation and self.validation.fraction) or 0.0

    def on(self, num_processes: int) -> Self:
        """With the accumulation that `global_batch_size` needs on so many processes. Raises `RecipeError`."""
        if (whole := self.global_batch_size) is None:
            return self
        steps, rest = divmod(whole, self.batch_size_per_process * num_processes)
        if rest or not steps or self.gradient_accumulation_steps not in (1, steps):
            sizes = range(min(self.batch_size_per_process, whole), 0, -1)
            fitting = [f"batch_size_per_process={n}" for n in sizes if whole % (n * num_processes) == 0]
            raise RecipeError(
                f"A step of {whole} images cannot be divided like this.",
                got=f"{num_processes} process(es) × batch_size_per_process {self.batch_size_per_process} "
                f"× gradient_accumulation_steps {self.gradient_accumulation_steps}",
                expected=f"a product of {whole}, with gradient_accumulation_steps left out",
                do=" or ".join([*fitting[:1], "global_batch_size=null, for steps of another size"]),
            )
        return self.model_copy(update={"gradient_accumulation_steps": steps})

    @property
    def batch_sizes(self) -> list[int]:
        return [one.batch_size_per_process for one in self.each]


PLACES_AND_SPEED = {
    *("output", "gradient_accumulation_steps", "resume", "checkpoint_every_steps", "keep_checkpoints"),
    *("log_every_steps", "trackers", "loader"),
}
"""What no run's numbers depend on; a stream's order does on its loader."""

_PLACES_AND_SPEED: dict[str, Any] = {
    **dict.fromkeys(PLACES_AND_SPEED, True),
    **dict.fromkeys(("cache", "images", "inputs", "teachers", "picture_every_steps"), True),
    **dict.fromkeys(("global_batch_size", "batch_size_per_process"), True),
    "validation": True,  # but for what it holds out of training
    "student": {"compile"},
    "multitask": {"dataset": {"root"}},
}
# Stated where not the default, since older checkpoints do not have them.
_CAME_LATER = {"cutmix", "norm", "weighting", "famo_lr", "famo_decay", "drop_probability", "targets"}

_OF_EVERY_KIND = {  # checkpoints state these whatever the student's kind is: those that it has not, so
    **{"reduction": 4, "adapter_paths": True, "sak_compat": False, "fusion": "mor", "decoder": "simple"},
    **{"preservation": True, "unification": True, "reconstruction": True},
}


def run_identity(recipe: TrainRecipe, facts: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides the numbers of a run, flat: a checkpoint can be continued only where it is equal.

    `facts` stand for what the recipe does not say: the cache's contents and the size of a whole batch,
    over processes and accumulation. So a run may go on with more or fewer processes, unless it streams.
    """
    said = recipe.model_dump(mode="json", exclude=_PLACES_AND_SPEED)
    distillation, student = (recipe.distillation, said["distillation"]), (recipe.student, said["student"])
    for model, tree in ((recipe, said), distillation, student):
        for key in _CAME_LATER & tree.keys() - model.model_dump(exclude_defaults=True).keys():
            del tree[key]
    if recipe.held_out:
        said["validation"] = {"fraction": recipe.held_out}
    if recipe.streams:
        said["loader"] = recipe.loader.model_dump(include={"kind", "shuffle_buffer"})
    return flatten(said | {"student": _OF_EVERY_KIND | said["student"]} | dict(facts))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
