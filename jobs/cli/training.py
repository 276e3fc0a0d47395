"""Verbs that train: a student from a cache, and decoders on a student's features or on cached ones."""

import signal
from typing import Annotated

import typer

from teachercache.jobs.cli.terminal import Overrides, RecipeArgument, console

DryRun = Annotated[bool, typer.Option(help="Print steps, hours, reads or problems, and stop.")]
Processes = Annotated[int, typer.Option(min=1, help="With --dry-run: GPUs to plan for.")]
GpuOption = Annotated[str, typer.Option(help="With --dry-run: the kind of GPU.")]
Tflops = Annotated[float | None, typer.Option(min=0.001, help="TFLOP/s that a GPU sustains.")]


def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    processes: Processes = 1,
    samples: Annotated[
        int | None, typer.Option(min=1, help="With --dry-run: images of a cache that is not built yet.")
    ] = None,
    gpu: GpuOption = "h100",
    tflops_per_gpu: Tflops = None,
    costs: Annotated[
        bool, typer.Option("--costs", help="With --dry-run: cost of teachers and student (SAK, Table 21).")
    ] = False,
) -> None:
    """Train a student in this one process; use `accelerate launch jobs/train_student.py` for several.

    Example: `teachercache train sak_stage1_base cache=/data/cache output=runs/base`
    """
    from teachercache.jobs.recipes import find_recipe
    from teachercache.student.training.train_recipe import TrainRecipe

    checked = find_recipe(TrainRecipe, recipe, overrides or [])
    if dry_run:
        from teachercache.jobs.train_dry_run import costs_table, plan_training, sustained, train_plan_table

        rate = tflops_per_gpu or sustained(gpu)
        plan = plan_training(checked, processes=processes, tflops_per_gpu=rate, num_samples=samples)
        console.print(train_plan_table(checked, plan))
        if costs:
            console.print(costs_table(checked, plan))
        return
    from teachercache.student.training.train import train as train_student

    if train_student(checked).interrupted:
        raise typer.Exit(128 + signal.SIGTERM)


def train_decoders(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    processes: Processes = 1,
    gpu: GpuOption = "h100",
    tflops_per_gpu: Tflops = None,
) -> None:
    """Train decoders (UPerNet, MaskDINO, a linear layer) on a student's features, or on those of cached
    teachers.

    `accelerate launch -m teachercache.jobs.cli train-decoders …` does the same with several processes. The
    same command again continues from the newest checkpoint.

    Example: `teachercache train-decoders kpu_decoders_frozen student=runs/kpu_base/student
    output=runs/decoders`
    """
    from teachercache.jobs.recipes import find_recipe
    from teachercache.student.training.decoder_recipe import DecoderRecipe

    checked = find_recipe(DecoderRecipe, recipe, overrides or [])
    if dry_run:
        from teachercache.jobs.train_dry_run import decoder_plan_table, sustained
        from teachercache.student.training.train_plan import make_decoder_plan

        rate = tflops_per_gpu or sustained(gpu)
        plan = make_decoder_plan(checked, processes=processes, tflops_per_gpu=rate)
        console.print(decoder_plan_table(checked, plan))
        return
    from teachercache.student.training.train_decoders import train_decoders as train

    if train(checked).interrupted:
        raise typer.Exit(128 + signal.SIGTERM)
