"""What a recipe and a cache ask of each other, all of it before weights are loaded or a step is taken."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import PIL

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import CacheMismatchError, Problems, RecipeError, require_known
from teachercache.pipeline.loading.sampler import ShardShuffleSampler, held_out_samples
from teachercache.pipeline.loading.streaming import StreamSampler
from teachercache.pipeline.records.spec import IMAGES, CacheSpec, TeacherSpec
from teachercache.pipeline.records.strict import Size
from teachercache.pipeline.records.view_policy import ViewPolicy
from teachercache.student.losses.distillation import DistillationLoss
from teachercache.student.losses.tasks import MultiTaskLoss
from teachercache.student.models.student import Student, TeacherFacts
from teachercache.student.similarity import Similarity, mean_similarity
from teachercache.student.training.checkpoint import require_output
from teachercache.student.training.cutmix import unmixable
from teachercache.student.training.run_log import missing_trackers
from teachercache.student.training.student_recipe import first_student
from teachercache.student.training.targets import complete_teachers
from teachercache.student.training.train_recipe import TrainRecipe, ValidationRecipe
from teachercache.student.training.view_labels import ViewLabels, task_channels

_OF_OTHER_IMAGES = {"num_views", "seed", "tables_hash"}  # may be others: what is compared stays the same


@dataclass
class Preflight:
    """What was found. `teachers`: those that the run learns from; `facts`: of them, for a student; `held`:
    whose features the cache must hold.

    `num_samples`: of an epoch. `validation`: `mean_similarity` on held-out samples, of a student. `tasks`:
    name → output channels. `student` is blank (`first_student`). What is None is not asked for, or a problem
    keeps it from being made.
    """

    teachers: dict[str, TeacherSpec]
    facts: dict[str, TeacherFacts]
    held: list[str]
    views: ViewPolicy
    num_samples: int | None = None
    tasks: dict[str, int] | None = None
    task_loss: MultiTaskLoss | None = None
    student: Student | None = None
    labels: ViewLabels | None = None
    sampler: ShardShuffleSampler | None = None
    validation: Callable[..., dict[str, Similarity]] | None = None
    notices: list[str] = field(default_factory=list)
    problems: Problems = field(default_factory=Problems)

    def require(self, tell: Callable[[str], object]) -> None:
        """Tell every notice; then raise what stands in the way, where that is several things as one."""
        for notice in self.notices:
            tell(notice)
        self.problems.require_none()


def preflight(
    recipe: TrainRecipe,
    spec: CacheSpec,
    cache: FeatureCache | None = None,
    *,
    processes: int = 1,
    rank: int = 0,
    num_samples: int | None = None,
) -> Preflight:
    """Ask all that can be asked of a cache of `spec`; of `cache`, where it is there, also what it holds. What
    a cache that is not there would lack is a notice.

    `num_samples`: those of an epoch, where not the cache's are meant.
    """
    names = list(spec.teachers) if recipe.teachers is None else list(recipe.teachers)
    teachers = {name: spec.teachers[name] for name in names if name in spec.teachers}
    facts = {name: TeacherFacts.of(one, spec.views) for name, one in teachers.items()}
    checked = Preflight(teachers, facts, list(teachers), spec.views, num_samples=num_samples)
    with checked.problems.noted():
        spec.check_teachers(names)
    if cache is not None:
        _ask_cache(checked, recipe, cache, processes, rank)
    if (wanted := recipe.multitask) is not None:
        with checked.problems.noted():
            tasks = task_channels(wanted)
            checked.task_loss = MultiTaskLoss(tasks, wanted.weights)
            checked.tasks = tasks
            checked.labels = None if cache is None else ViewLabels(wanted, cache)
    with checked.problems.noted():
        _require_length(checked.num_samples, recipe, processes, is_built=cache is not None)
    for name in recipe.distillation.teacher_weights:
        with checked.problems.noted():
            require_known("distilled teacher (distillation.teacher_weights)", name, names)
    checked.problems += missing_trackers(recipe.trackers)
    with checked.problems.noted():
        require_output(recipe.checkpoint_folder, recipe.resume)
    checked.problems += _unbalanced(recipe, teachers)
    if recipe.cutmix:
        checked.problems += unmixable(recipe.batch_size_per_process, spec.views, teachers)
    if len(teachers) == len(names) and (checked.tasks is None) == (recipe.multitask is None):
        size, distills = spec.views.size, recipe.distills
        with checked.problems.noted():
            checked.student = first_student(
                recipe.student, facts, size, checked.tasks, distills=distills, blank=True
            )
    cached = checked.held if recipe.reads_cache else []
    lacks = [*recipe.student.requirements(teachers)]
    if (grid := getattr(getattr(checked.student, "stem", None), "grid", None)) is not None:
        compared = {name: teachers[name] for name in cached if recipe.distills}
        lacks += _other_grids(recipe, compared, spec.views, grid)
    if cache is None:  # its build may still be told otherwise
        checked.notices += map(str, lacks)
    else:
        checked.problems += lacks
    checked.notices += notices(recipe, spec, cached)
    return checked


def joined(recipe: TrainRecipe, parts: Sequence[Preflight]) -> Preflight:
    """What was found of all inputs of `recipe`, each asked as one of `TrainRecipe.each`."""
    if len(parts) == 1:
        return parts[0]
    names = [name for part in parts for name in part.teachers]
    teachers = {name: spec for part in parts for name, spec in part.teachers.items()}
    facts = {name: one for part in parts for name, one in part.facts.items()}
    checked = Preflight(teachers, facts, names, parts[0].views, num_samples=parts[0].num_samples)
    checked.problems += {str(one): one for part in parts for one in part.problems}.values()
    alone = {line for part in parts for line in recipe.student.notices(part.teachers)}
    checked.notices = [line for part in parts for line in part.notices if line not in alone]
    checked.notices += recipe.student.notices(teachers)
    if measures := [part.validation for part in parts if part.validation]:
        checked.validation = partial(_of_all, measures)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        checked.problems.append(
            RecipeError(
                "A teacher belongs to one input only.",
                got=f"{', '.join(twice)} in several inputs",
                expected="each teacher once",
                do="name the teachers of each input",
            )
        )
    for name in recipe.distillation.teacher_weights:
        with checked.problems.noted():
            require_known("distilled teacher (distillation.teacher_weights)", name, names)
    with checked.problems.noted():
        size, distills = checked.views.size, recipe.distills
        checked.student = first_student(recipe.student, facts, size, None, distills=distills, blank=True)
    return checked


def _of_all(
    measures: Sequence[Callable[..., dict[str, Similarity]]], student: Student, **how: Any
) -> dict[str, Similarity]:
    return {name: one for measure in measures for name, one in measure(student, **how).items()}


def _ask_cache(
    checked: Preflight, recipe: TrainRecipe, cache: FeatureCache, processes: int, rank: int
) -> None:
    sampler = partial(
        ShardShuffleSampler,
        batch_size_per_process=recipe.batch_size_per_process,
        rank=rank,
        world_size=processes,
        seed=recipe.seed,
    )
    among = held_out = None
    with checked.problems.noted():
        if recipe.features == "hybrid":
            held = complete_teachers(cache, checked.held)
            if checked.held and not held:
                raise RecipeError(
                    "A hybrid run reads at least one teacher.",
                    got=f"no complete one of {', '.join(checked.held)} in {cache.storage.url}",
                    expected="a teacher with every shard committed",
                    do="finish the build of one of them",
                )
            checked.held = held
        if recipe.held_out:
            keys = cache.samples["key"].to_pylist()
            held_out = held_out_samples(keys, recipe.held_out, recipe.seed)
            among = np.setdiff1d(np.arange(len(keys)), held_out)
        drawing: Callable[..., ShardShuffleSampler] = sampler
        if recipe.streams:
            drawing = partial(StreamSampler, **sampler.keywords, shuffle_buffer=recipe.loader.shuffle_buffer)
        checked.sampler = drawing(cache, checked.held or None, fraction=recipe.fraction, among=among)
        checked.num_samples = checked.num_samples or checked.sampler.num_samples
    if cache.spec.images == "rendered":
        with checked.problems.noted():
            checked.notices += _pixel_notices(recipe, cache, checked.held if recipe.reads_cache else ())
    if (wanted := recipe.validation) is None or (recipe.held_out and checked.sampler is None):
        return
    with checked.problems.noted():
        teachers = checked.held if recipe.held_out else list(checked.teachers)
        images = cache if recipe.held_out else _open_second(wanted, cache, teachers)
        samples = sampler(images, teachers, among=held_out)
        count, threads = min(wanted.max_samples, samples.num_samples), recipe.loader.threads
        of_these = partial(mean_similarity, sampler=samples, teachers=teachers, num_samples=count)
        checked.validation = partial(of_these, threads=threads, seed=recipe.seed)
        checked.notices.append(
            f"Similarity to {', '.join(teachers)} is measured every {wanted.every_steps:,} steps, on"
            f" {count:,} images of {images.storage.url} that are not trained on."
        )
        if images is not cache and (shared := len(_images(images) & _images(cache))):
            checked.notices.append(f"But {shared:,} of the images in {images.storage.url} are trained on.")


def _pixel_notices(recipe: TrainRecipe, cache: FeatureCache, cached: Iterable[str]) -> Iterator[str]:
    """Of a cache that holds the student's pixels."""
    if recipe.features == "fresh" or recipe.student_jitter:
        yield "The pixels in the cache are not read: fresh views and jitter are rendered from the images."
        return
    made = _pillows(cache, IMAGES)
    for name in cached:
        if any(made.get(shard, by) != by for shard, by in _pillows(cache, name).items()):
            yield f"Some bits of the student's pixels may differ from {name}'s: another Pillow rendered them."
    others = sorted({*made.values()} - {PIL.__version__})
    if others and (recipe.features == "hybrid" or not recipe.reads_cache):
        yield (
            f"The student's pixels were rendered by Pillow {', '.join(others)}, the teachers' are by"
            f" {PIL.__version__} here: they may differ in some bits. Install the former, or give images:"
            " reference to a build of your own."
        )


def _pillows(cache: FeatureCache, name: str) -> dict[int, str]:
    return {shard: one.versions.get("pillow", "unknown") for shard, one in cache.commits(name).items()}


def _images(cache: FeatureCache) -> set[str]:
    return set(cache.samples["head_hash"].to_pylist())


def _open_second(wanted: ValidationRecipe, cache: FeatureCache, teachers: Sequence[str]) -> FeatureCache:
    """The cache to validate on. Raises `CacheError` unless its images, and they alone, are not `cache`'s."""
    other = FeatureCache.open(wanted.cache or "", images=wanted.images)
    parts = tuple(f"{part}." for part in ("views", *(f"teachers.{name}" for name in teachers)))
    differing = {
        name: pair
        for name, pair in cache.spec.differences(other.spec).items()
        if name.startswith(parts) and name.rpartition(".")[2] not in _OF_OTHER_IMAGES
    }
    if not set(teachers) <= set(other.teachers):
        differing["teachers"] = ", ".join(teachers), ", ".join(other.teachers)
    if _images(other) <= _images(cache):
        differing["images"] = "others than are trained on", f"{other.num_samples:,}, all of them trained on"
    if differing:
        ours, theirs = (", ".join(f"{name}: {pair[i]}" for name, pair in differing.items()) for i in (0, 1))
        raise CacheMismatchError(
            f"The validation cache {wanted.cache} needs the recipe of the training cache, and other images.",
            got=theirs,
            expected=ours,
            do="build it as the cache to train on, with another source.path; or give validation.fraction",
        )
    return other


def _require_length(num_samples: int | None, recipe: TrainRecipe, processes: int, *, is_built: bool) -> None:
    """Raises `RecipeError` where an epoch has no length or not one step, or the run is all warm-up."""
    images_per_step = recipe.images_per_step(processes)
    if num_samples is None:
        if recipe.schedule.epochs and not is_built:
            raise RecipeError(
                "The length of an epoch is unknown until the cache exists.",
                got=f"schedule.epochs={recipe.schedule.epochs:g}, and no cache at {recipe.cache}",
                expected="the number of images",
                do="add --samples, such as 1281167 for ImageNet-1k",
            )
        return
    if images_per_step > num_samples:
        own = "batch_size_per_process or gradient_accumulation_steps"
        raise RecipeError(
            "A step takes more images than the cache holds.",
            got=f"{images_per_step} images a step, over processes and accumulation",
            expected=f"at most {num_samples}, the valid samples of the cache",
            do=f"lower {'global_batch_size' if recipe.global_batch_size else own}",
        )
    recipe.schedule.steps(num_samples / images_per_step)


def _unbalanced(recipe: TrainRecipe, teachers: Mapping[str, TeacherSpec]) -> Iterator[RecipeError]:
    """What keeps teachers from being weighed, or brought to equal terms."""
    wanted = recipe.distillation
    if wanted.weighting != "equal" and recipe.gradient_accumulation_steps > 1:
        yield RecipeError(
            f"{wanted.weighting} needs the losses of a whole step at once.",
            got=f"gradient_accumulation_steps {recipe.gradient_accumulation_steps}",
            expected="1",
            do="use more processes, a larger batch_size_per_process, or weighting=equal",
        )
    adjoint = [name for name, spec in teachers.items() if spec.grid.kind == "adjoint"]
    if wanted.targets != "raw" and adjoint:
        yield RecipeError(
            f"Maps on the adjoint grid cannot be {wanted.targets}: their stored norms are of raw features.",
            got=f"grid: adjoint of {', '.join(adjoint)}",
            expected="grid: native or bilinear",
            do="set distillation.targets=raw, or build a cache of these images with such a grid",
        )


def _other_grids(
    recipe: TrainRecipe, teachers: Mapping[str, TeacherSpec], views: ViewPolicy, grid: Size
) -> Iterator[RecipeError]:
    """Windows and cached adjoint maps of `teachers` that do not lie on the `grid` of the student's tokens."""
    own = views.size[0] // views.patch, views.size[1] // views.patch
    if views.margin and grid != own:
        yield RecipeError(
            "The windows of this cache's views move by other steps than the student's tokens.",
            got=f"{grid} tokens of the stem {recipe.student.stem}",
            expected=f"{own}, of {views.patch} pixels each (views.patch of the cache)",
            do="choose a stem with patches of this size, or a cache whose views.patch is the stem's",
        )
    for name, spec in teachers.items():
        seen = views.seen_grid(spec.stored_grid)
        if recipe.student.loss is DistillationLoss and spec.grid.kind == "adjoint" and grid != seen:
            yield RecipeError(
                f"The adjoint grid of teacher {name} fits one student grid only.",
                got=f"{grid} tokens of the stem {recipe.student.stem}",
                expected=f"{seen}, as in the cache",
                do="choose a stem with patches of another size, or a cache with grid: native",
            )


def notices(recipe: TrainRecipe, spec: CacheSpec, cached: Sequence[str]) -> list[str]:
    """Where cache and recipe make it another run than it may seem, one line each; `cached` are the teachers
    whose features are read."""
    lines = list(recipe.student.notices({name: spec.teachers[name] for name in cached}))
    if recipe.multitask and not spec.views.policy.startswith("multitask_"):
        lines.append(
            f"The cache has {spec.views.policy} views: labels are learnt on those, and not on the ones of"
            " stage 2, multitask_train."
        )
    finer = [name for name in cached if _is_finer(spec.teachers[name])]
    if recipe.distills and finer:
        wanted = recipe.distillation
        inexact = ["smooth-L1"] if wanted.distance == "smooth_l1" and wanted.distance_weight else []
        inexact += ["the cosine of tokens"] if wanted.cosine == "token" and wanted.cosine_weight else []
        if inexact:
            lines.append(
                f"On the adjoint grid of {', '.join(finer)} {' and '.join(inexact)} "
                f"{'are approximations' if len(inexact) > 1 else 'is an approximation'}: exact are"
                " distillation.cosine=flattened with distillation.distance=squared_error, or native grids."
            )
    return lines


def _is_finer(teacher: TeacherSpec) -> bool:
    """Whether the teacher's own grid says more than its adjoint."""
    pairs = zip(teacher.native_grid, teacher.stored_grid, strict=True)
    return teacher.grid.kind == "adjoint" and any(own > stored for own, stored in pairs)
