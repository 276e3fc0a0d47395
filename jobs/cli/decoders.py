"""The verb that trains decoders on a student's features, or on cached ones."""

import signal

import typer

from teachercache.jobs.cli.terminal import DryRun, Gpu, Overrides, Processes, RecipeArgument, Tflops, console


def train_decoders(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    processes: Processes = 1,
    gpu: Gpu = "h100",
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
