"""`teachercache train RECIPE --dry-run`: the cost of a run, by its cache or, if it does not exist yet, by the
recipe that builds the cache."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import RenderableType

from teachercache.cache_builder.build_recipe import GPUS, BuildRecipe, PlanRecipe
from teachercache.cache_builder.draft import spec_of, teachers_of
from teachercache.cache_builder.plan import bytes_per_row, pixel_bytes
from teachercache.cache_builder.teachers.registry import teacher_gmacs, teacher_parameters
from teachercache.jobs.inspection.tables import columns_table, lines, pixels_line
from teachercache.jobs.recipes import find_recipe
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import CacheNotFoundError, Problems
from teachercache.pipeline.recipe_files import check_recipe
from teachercache.pipeline.records.spec import CacheSpec, DatasetSpec
from teachercache.pipeline.units import human_bytes, human_hours
from teachercache.student.training.decoder_recipe import DecoderRecipe
from teachercache.student.training.preflight import joined, preflight
from teachercache.student.training.train_plan import TrainPlan, make_train_plan, of_all_inputs, student_size
from teachercache.student.training.train_recipe import TrainRecipe


def plan_training(
    recipe: TrainRecipe, *, processes: int, tflops_per_gpu: float, num_samples: int | None = None
) -> TrainPlan:
    """The plan; every notice is printed before it. `num_samples` replaces the cache's, and is needed for
    epochs of a cache that is not there yet.

    Raises `RecipeError` where there is neither the cache nor a shipped recipe of its name, and as `train`
    does for what stands in the way of the run.
    """
    recipe = recipe.on(processes)
    samples = round(recipe.fraction * (1 - recipe.held_out) * num_samples) if num_samples else None
    parts = [
        preflight(one, spec, cache, processes=processes, num_samples=samples)
        for one, (cache, spec) in zip(recipe.each, map(_cache, recipe.each), strict=True)
    ]
    whole = joined(recipe, parts)
    whole.require(print)
    plans = []
    for one, checked in zip(recipe.each, parts, strict=True):
        assert checked.student is not None
        plan = make_train_plan(
            one,
            checked.student,
            checked.facts,
            num_samples=checked.num_samples or one.images_per_step(processes),
            row_bytes=sum(map(bytes_per_row, checked.teachers.values())),
            processes=processes,
            tflops_per_gpu=tflops_per_gpu,
        )
        plans.append(plan)
    if len(plans) == 1:
        return plans[0]
    assert whole.student is not None
    return of_all_inputs(plans, student_size(recipe.student, whole.student, whole.facts, distills=True))


def sustained(gpu: str) -> float:
    """TFLOP/s of training. Raises `RecipeError` for a GPU that the table does not have."""
    return GPUS[check_recipe(PlanRecipe, {"gpu": gpu}, "--dry-run").gpu].training


def _cache(recipe: TrainRecipe) -> tuple[FeatureCache | None, CacheSpec]:
    """The cache and its spec; before it is there, that of the recipe which builds it, of no samples."""
    try:
        cache = FeatureCache.open(recipe.cache, images=recipe.images)
    except CacheNotFoundError:
        build = find_recipe(BuildRecipe, Path(recipe.cache).name)
        problems = Problems()
        teachers = teachers_of(build, problems)
        problems.require_none()
        dataset = DatasetSpec(kind="", location="", num_samples=0, fingerprint="")
        return None, spec_of(build, dataset, teachers)
    return cache, cache.spec


def costs_table(recipe: TrainRecipe, plan: TrainPlan) -> RenderableType:
    """Parameters and arithmetic of the teachers and the student, as fvcore counts it (SAK, Table 21)."""
    specs = {
        name: spec
        for one in recipe.each
        for name, spec in _cache(one)[1].teachers.items()
        if one.teachers is None or name in one.teachers
    }
    costs: dict[str, tuple[Sequence[int], float, float]] = {
        name: (spec.image_size, teacher_parameters(spec), teacher_gmacs(spec)) for name, spec in specs.items()
    }
    costs["student"] = plan.image_size, plan.size.num_parameters, plan.size.gmacs - plan.size.attention_gmacs
    _, parameters, gmacs = zip(*costs.values(), strict=True)
    costs["all"] = (), sum(parameters), sum(gmacs)
    columns = {
        name: {
            "input": "×".join(map(str, image_size)),
            "#Param": f"{parameters / 1e6:,.0f}M",
            "GMACs, without attention's own": f"{gmacs:,.0f}",
        }
        for name, (image_size, parameters, gmacs) in costs.items()
    }
    return columns_table("Table 21", columns)


def train_plan_table(recipe: TrainRecipe, plan: TrainPlan) -> RenderableType:
    rate = f"{human_bytes(round(plan.read_bytes_per_s))}/s of the cache, for {plan.images_per_s:,.0f} img/s"
    of_a_gpu = plan.images_per_s / plan.processes / sum(recipe.batch_sizes)
    pixels = []
    for one in recipe.each:
        spec, images_per_s = _cache(one)[1], of_a_gpu * one.batch_size_per_process
        pixels.append(pixels_line(spec, pixel_bytes(spec), images_per_s, PlanRecipe().render_ms))
    return lines(
        _costs(plan, f"({plan.size.attention_gmacs:.1f} of the stem's are attention's own products)")
        | {
            "reads": f"{rate}; a slower disk takes longer" if plan.row_bytes else "no features of the cache",
            "pixels": "\n".join(pixels),
        }
    )


def decoder_plan_table(recipe: DecoderRecipe, plan: TrainPlan) -> RenderableType:
    data = (
        f"{name} {size} of {count:,} images of {dataset}"
        for (name, (dataset, count)), size in zip(plan.inputs.items(), recipe.batch_sizes, strict=True)
    )
    return lines({"data": "; ".join(data) + ", in each process"} | _costs(plan, "without losses"))


def _costs(plan: TrainPlan, of_gmacs: str) -> dict[str, str]:
    size = plan.size
    gpus = f"{plan.processes} GPUs at {plan.tflops_per_gpu:g} TFLOP/s sustained by each (--gpu)"
    parts = ", ".join(f"{part} {count:,}" for part, count in size.parameters.items() if count)
    gmacs = ", ".join(f"{part} {count:.1f}" for part, count in size.gmacs_by_part.items())
    hours, unit = human_hours(plan.hours)
    return {
        "steps": f"{plan.steps:,} of {plan.images_per_step} images, {plan.images:,} in all",
        "parameters": parts,
        "#Param": f"{size.num_parameters:,} to predict with; {size.trained:,} are trained",
        "GMACs": f"a view forward: {gmacs} {of_gmacs}; {size.train_gmacs:.1f} with backward",
        unit: f"at least {hours} on {gpus}, {' GPU-'.join(human_hours(plan.gpu_hours))}",
    }
