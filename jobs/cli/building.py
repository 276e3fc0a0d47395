"""Verbs that compute: distill, plan, build, here or on a cluster, and calibrate."""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import teachercache
from teachercache.jobs.cli.terminal import Overrides, RecipeArgument, console, names
from teachercache.jobs.launch import require_absolute_in_job

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from teachercache.cache_builder.budget import Option
    from teachercache.cache_builder.build_recipe import BuildRecipe
    from teachercache.cache_builder.draft import Draft
    from teachercache.pipeline.records.spec import TeacherSpec

_ANSWER_S = 5.0
# Keys and addresses of stores; no profiles, files and addresses, which are on this machine alone.
_PASSED = re.compile(
    r"(?!.*_(PROFILE|FILE|DIR|BUNDLE|PATH|RELATIVE_URI)$)(AWS_|AZURE_STORAGE_|FSSPEC_|HF_(TOKEN|ENDPOINT)$)"
)


def distill(
    images: Annotated[str, typer.Argument(metavar="IMAGES", help="A folder of images, tars or Parquet.")],
    cache: Annotated[str | None, typer.Option(help="Where the cache goes (IMAGES.teachercache).")] = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Where the student goes (IMAGES.student).")
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained/--random-weights", help="From the Hub, or random for a trial.")
    ] = True,
    build: Annotated[list[str] | None, typer.Option(help="KEY=VALUE for the cache; repeat it.")] = None,
    train: Annotated[list[str] | None, typer.Option(help="KEY=VALUE for the student; repeat it.")] = None,
    print_recipes: Annotated[bool, typer.Option("--print-recipes", help="Print both, and stop.")] = False,
) -> None:
    """From images to a student in one command; run it again to continue after any stop.

    Teachers, views, batches and length follow from the device, the memory and the disk that there are. It
    builds `photos_cache` and trains `photos_student`; with `--print-recipes` you see both as they will be.

    Example: `teachercache distill ~/photos --build views.num_views=4 --train schedule.max_steps=500`
    """
    from teachercache.jobs.distill import choose_recipes, follow, in_yaml

    recipes = choose_recipes(images, cache, output, pretrained, build or [], train or [])
    if print_recipes:
        typer.echo("---\n".join(in_yaml(*recipes).values()), nl=False)
    elif follow(*recipes)[1].interrupted:
        raise typer.Exit(128 + signal.SIGTERM)


def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Images, before they are here.")] = None,
    image_bytes: Annotated[int, typer.Option(min=1, help="With --samples: mean bytes of a file.")] = 110_000,
    runs: Annotated[str | None, typer.Option(help="Trainings that will read the cache (1).")] = None,
    epochs: Annotated[str | None, typer.Option(help="Epochs of each training (30).")] = None,
    gpu: Annotated[str | None, typer.Option(help="The kind of GPU (h100).")] = None,
    tflops_per_gpu: Annotated[str | None, typer.Option(help="TFLOP/s that a GPU sustains.")] = None,
    measure: Annotated[bool, typer.Option(help="Measure rates here, for plan.measure_s=30.")] = False,
) -> None:
    """Print what a build will cost (rows, bytes, files, GPU-hours), and whether it pays; nothing runs.

    It pays where teachers that run in every training cost more, at the recipe's prices (`plan.usd_per_…=`).
    Exits with status 1 when the disk is too small.

    With `budget=6TB` it loads the teachers, tries codecs on a calibration sample, and says which grids and
    codecs keep to it at the least loss.

    Example: `teachercache plan imagenet1k_vitl source.path=/data/train cache=/data/cache budget=6TB`
    """
    from teachercache.cache_builder.builder import foresee, prepare
    from teachercache.jobs.inspection.tables import options_table, plan_table
    from teachercache.pipeline.units import human_bytes

    use = {"runs": runs, "epochs": epochs, "gpu": gpu, "teacher_tflops_per_gpu": tflops_per_gpu}
    stated = [f"plan.{key}={value}" for key, value in use.items() if value is not None]
    checked = _recipe(recipe, [*(overrides or []), *stated])
    if samples is not None:
        drafted, result = None, foresee(checked, samples, image_bytes)
    else:
        drafted, _, result = prepare(checked, console)
    if measure:
        from teachercache.cache_builder.rates import measure_rates

        with console.status("measuring the teachers and the decoding"):
            result = replace(result, measured=measure_rates(checked, drafted))
    console.print(plan_table(result))
    if checked.budget is not None and drafted is not None:
        from teachercache.cache_builder.budget import choose, require_possible

        specs = _candidates(checked, drafted)
        require_possible(specs, result, checked.budget)
        chosen = choose(_measure(checked, drafted, specs), result, checked.budget)
        table = options_table({name: [option] for name, option in chosen.items()}, result.spec.num_rows)
        console.print(table)
        console.print(f"Within {human_bytes(checked.budget)}, on the calibration sample. Add to the command:")
        console.print(" ".join(option.overrides(name) for name, option in chosen.items()))
    result.require()


def build(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help="Print the plan and what stands in its way.")] = False,
) -> None:
    """Run the teachers and fill the cache; run it again to continue after any stop.

    `runner.kind=ray` uses the Ray cluster that `ray start` made, or starts one here.

    Example: `teachercache build demo source.path=~/photos cache=/tmp/cache "teachers=[dinov2_small]"`
    """
    from teachercache.cache_builder.builder import build as build_cache
    from teachercache.cache_builder.builder import prepare
    from teachercache.jobs.inspection.tables import plan_table
    from teachercache.pipeline.sources.several import own_places

    checked = _recipe(recipe, overrides)
    require_absolute_in_job("cache", checked.cache)
    for place in own_places(checked.source.path, checked.source.kind):
        require_absolute_in_job("source.path", place)
    if dry_run:
        planned = prepare(checked, console)[2]
        console.print(plan_table(planned))
        planned.require(checked.budget)
        return
    result = build_cache(checked, console)
    console.print(
        f"{result.cache.storage.url}: {result.shards} shards, {result.views} views in {result.wall_s:.1f} s"
        f" ({result.views / result.wall_s:.2f} img/s)"
        if result.views
        else f"{result.cache.storage.url}: complete",
    )
    if result.quarantined:
        console.print(f"{result.quarantined} samples are quarantined; `teachercache inspect` names them.")


def submit(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(help="Where the cluster takes jobs, HEAD:8265 (RAY_ADDRESS, or this machine)."),
    ] = None,
    env: Annotated[list[str], typer.Option(help="Another variable that the job needs.")] = [],  # noqa: B006
) -> None:
    """Send a build to a Ray cluster, with this checkout's code and the keys of its stores, and follow it.

    Variables of S3, Azure, fsspec and the Hugging Face Hub go with it; a line says which. Ctrl-C leaves the
    job running, and says how to follow and how to stop it.

    Example: `teachercache submit imagenet1k_vitl source.path=s3://bucket/train cache=s3://bucket/cache`
    """
    from teachercache.jobs.recipes import SHIPPED
    from teachercache.pipeline.errors import ArgumentError, BuildError, extra

    with extra("build"):
        import requests
        from ray.exceptions import RayError
        from ray.job_submission import JobSubmissionClient

    _recipe(recipe, overrides)
    if unset := [name for name in env if name not in os.environ]:
        raise ArgumentError(
            "A variable for the job is not set.",
            got=f"--env {' --env '.join(unset)}",
            expected="names of variables of this environment",
            do="export it first, or leave it out",
        )
    root = Path(teachercache.__file__).parents[1]
    if not (SHIPPED / f"{recipe}.yaml").is_file():
        recipe = str(Path(recipe).resolve()).removeprefix(f"{root}/")
    variables = {name: os.environ[name] for name in sorted(os.environ) if _PASSED.match(name) or name in env}
    code = {"working_dir": str(root)} if (root / ".rayignore").is_file() else {}  # else it is installed there
    # `ray job stop` would give it 3 s, and a build needs up to 20 to end cleanly.
    runtime_env = {**code, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "30", **variables}}
    command = ["python", "-m", "teachercache.jobs.cache_teachers", recipe, *(overrides or [])]
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        if address is not None:
            address = address if "://" in address else f"http://{address}"
            os.environ["RAY_API_SERVER_ADDRESS"] = address  # RAY_ADDRESS would win over an argument
            if address.startswith("http"):
                requests.get(address, timeout=_ANSWER_S)  # Ray would wait for minutes
        client = JobSubmissionClient(address)
        job = client.submit_job(entrypoint=shlex.join(command), runtime_env=runtime_env)
    except (OSError, RuntimeError, RayError) as error:
        is_silent = isinstance(error, requests.RequestException)
        raise BuildError(
            "The Ray cluster does not take the job.",
            got=f"nothing that answers at {address}" if is_silent else str(error).strip().splitlines()[-1],
            expected="the dashboard of a running cluster, and RAY_AUTH_MODE and RAY_AUTH_TOKEN as there",
            do="name it with --address HEAD:8265",
        ) from error
    console.print(f"{job} gets the variables {', '.join(f'{name}=…' for name in variables) or '(none)'}")
    raise typer.Exit(_follow(client, job))


def _follow(client: JobSubmissionClient, job: str) -> int:
    """Print the job's output as it comes. Returns its exit status."""
    import asyncio

    async def show() -> None:
        async for text in client.tail_job_logs(job):
            print(text, end="", flush=True)

    try:
        asyncio.run(show())
    except KeyboardInterrupt:
        where = f"--address {client.get_address()} {job}"
        console.print(f"It goes on: ray job logs --follow {where}\nIt stops by: ray job stop {where}")
        return 0
    info = client.get_job_info(job)
    console.print(f"{job}: {info.status}")
    return 0 if info.status == "SUCCEEDED" else info.driver_exit_code or 1


def calibrate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    codecs: Annotated[Any, typer.Option(parser=names, metavar="A,B", help="Codecs to try.")] = None,
) -> None:
    """Try codecs on a calibration sample of the recipe's images and teachers; writes nothing.

    A build calibrates by itself. This is to choose a codec: `calibration_rows=N` sets the sample's size.

    Example: `teachercache calibrate imagenet1k_vitl source.path=/data/train calibration_rows=32`
    """
    from teachercache.cache_builder.builder import prepare
    from teachercache.jobs.inspection.tables import options_table

    checked = _recipe(recipe, overrides)
    drafted, spec, _ = prepare(checked, console)
    options = _measure(checked, drafted, _candidates(checked, drafted, codecs))
    console.print(options_table(options, spec.num_rows))


def _recipe(path: str, overrides: list[str] | None) -> BuildRecipe:
    from teachercache.cache_builder.build_recipe import BuildRecipe
    from teachercache.jobs.recipes import find_recipe

    return find_recipe(BuildRecipe, path, overrides or [])


def _candidates(
    recipe: BuildRecipe, drafted: Draft, codecs: list[str] | None = None
) -> dict[str, list[TeacherSpec]]:
    """What each teacher of the recipe could be stored as; what a cache has already stays as it is."""
    from teachercache.cache_builder.budget import candidates
    from teachercache.cache_builder.teachers.teacher_recipe import student_grid

    grid = student_grid(recipe.views.stored_size, recipe.views.patch)
    stored = drafted.old.teachers if drafted.old else {}
    rows = min(recipe.calibration_rows, drafted.spec.dataset.num_samples)
    return {
        name: [stored[name]]
        if name in stored and codecs is None
        else candidates(drafted.spec.teachers[name], grid, rows, codecs)
        for name in recipe.teachers
    }


def _measure(
    recipe: BuildRecipe, drafted: Draft, specs: Mapping[str, list[TeacherSpec]]
) -> dict[str, list[Option]]:
    from teachercache.cache_builder.budget import measure

    sample = drafted.calibration_sample(recipe.calibration_rows)
    options: dict[str, list[Option]] = {}
    with console.status("calibrating") as status:
        for name, available in measure(specs, sample, recipe.runner.batch_size):
            options[name] = available
            status.update(f"calibrated {', '.join(options)}")
    return options
