"""`teachercache train RECIPE --dry-run`: the cost of a run, by its cache or, if it does not exist yet, by the
recipe that builds the cache."""

from __future__ import annotations

from pathlib import Path

from rich.console import RenderableType

from teachercache.cache_builder.build_recipe import BuildRecipe
from teachercache.cache_builder.plan import bytes_per_row
from teachercache.cache_builder.teachers import resolve_teachers
from teachercache.cache_builder.teachers.flops import teacher_gmacs, teacher_parameters
from teachercache.jobs.inspection.tables import columns_table, lines
from teachercache.jobs.recipes import find_recipe
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import CacheNotFoundError, RecipeError
from teachercache.pipeline.records.spec import TeacherSpec, ViewPolicy
from teachercache.pipeline.units import human_bytes
from teachercache.student.datasets import dataset_class
from teachercache.student.models.student import require_known, teacher_facts
from teachercache.student.training.train_plan import TrainPlan, make_train_plan
from teachercache.student.training.train_recipe import TrainRecipe


def plan_training(
    recipe: TrainRecipe, *, processes: int, tflops_per_gpu: float, num_samples: int | None = None
) -> TrainPlan:
    """`num_samples` replaces the cache's, and is needed for epochs of a cache that does not exist yet.

    Raises `RecipeError` if there is neither the cache nor a shipped recipe of its name.
    """
    views, specs, num_cached = _cache_facts(recipe)
    for name in recipe.teachers or ():
        require_known("teacher of this cache", name, specs)
    names = specs if recipe.teachers is None else recipe.teachers
    samples = num_samples or num_cached
    if samples is None and recipe.schedule.epochs:
        raise RecipeError(
            "The length of an epoch is unknown before the cache exists.",
            got=f"schedule.epochs={recipe.schedule.epochs:g}, and no cache at {recipe.cache}",
            expected="the number of images",
            do="add --samples, such as 1281167 for ImageNet-1k",
        )
    tasks = None
    if recipe.multitask:
        channels = dataset_class(recipe.multitask.dataset.kind).tasks
        tasks = {task: channels[task] for task in recipe.multitask.tasks or channels}
    return make_train_plan(
        recipe,
        num_samples=round(recipe.fraction * samples) if samples else recipe.images_per_step(processes),
        image_size=views.size,
        **teacher_facts({name: specs[name] for name in names}, views),
        num_levels={name: specs[name].num_levels for name in names},
        tasks=tasks,
        row_bytes=sum(bytes_per_row(specs[name]) for name in names),
        processes=processes,
        tflops_per_gpu=tflops_per_gpu,
    )


def _cache_facts(recipe: TrainRecipe) -> tuple[ViewPolicy, dict[str, TeacherSpec], int | None]:
    """(views, teachers, number of samples)."""
    try:
        spec = FeatureCache.open(recipe.cache).spec
    except CacheNotFoundError:
        build = find_recipe(BuildRecipe, Path(recipe.cache).name)
        return build.views, resolve_teachers(build.teachers, build.views, build.sak_compat), None
    return spec.views, dict(spec.teachers), spec.dataset.num_samples


def costs_table(recipe: TrainRecipe, plan: TrainPlan) -> RenderableType:
    """Parameters and arithmetic of the teachers and the student, as fvcore counts it (SAK, Table 21)."""
    _, specs, _ = _cache_facts(recipe)
    names = specs if recipe.teachers is None else recipe.teachers
    costs = {
        name: (specs[name].image_size, teacher_parameters(specs[name]), teacher_gmacs(specs[name]))
        for name in names
    }
    size = plan.size
    costs["student"] = plan.image_size, size.num_parameters, size.gmacs - size.attention_gmacs
    columns = {
        name: {
            "input": f"{image_size[0]}×{image_size[1]}",
            "#Param": f"{parameters / 1e6:,.0f}M",
            "GMACs, without attention's own": f"{gmacs:,.0f}",
        }
        for name, (image_size, parameters, gmacs) in costs.items()
    }
    _, parameters, gmacs = zip(*costs.values(), strict=True)
    columns["all"] = {
        "input": "",
        "#Param": f"{sum(parameters) / 1e6:,.0f}M",
        "GMACs, without attention's own": f"{sum(gmacs):,.0f}",
    }
    return columns_table("Table 21", columns)


def train_plan_table(plan: TrainPlan) -> RenderableType:
    size = plan.size
    gpus = f"{plan.processes} GPUs at {plan.tflops_per_gpu:g} TFLOP/s sustained by each (--gpu)"
    rate = f"{human_bytes(round(plan.read_bytes_per_s))}/s of the cache, for {plan.images_per_s:,.0f} img/s"
    parts = ", ".join(f"{part} {count:,}" for part, count in size.parameters.items() if count)
    gmacs = ", ".join(f"{part} {count:.1f}" for part, count in size.gmacs_by_part.items())
    attention = f"({size.attention_gmacs:.1f} of the stem's are attention's own products)"
    return lines(
        {
            "steps": f"{plan.steps:,} of {plan.images_per_step} images, {plan.images:,} in all",
            "parameters": parts,
            "#Param": f"{size.num_parameters:,} to predict with; {size.trained:,} are trained",
            "GMACs": f"a view forward: {gmacs} {attention}; {size.train_gmacs:.1f} with backward",
            "hours": f"at least {plan.hours:.3g} on {gpus}, {plan.gpu_hours:.3g} GPU-hours",
            "reads": f"{rate}; a slower disk takes longer" if plan.row_bytes else "no features of the cache",
        }
    )
