"""Verbs of decoders: trained on a student's features, or on cached ones, and measured."""

import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from teachercache.jobs.cli.terminal import Json, Overrides, RecipeArgument, print_result


def train_decoders(recipe: RecipeArgument, overrides: Overrides = None) -> None:
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
    from teachercache.student.training.train_decoders import train_decoders as train

    if train(checked).interrupted:
        raise typer.Exit(128 + signal.SIGTERM)


def evaluate_decoders(
    decoders: Annotated[
        Path, typer.Argument(metavar="DECODERS", help="A folder that `train-decoders` wrote (…/decoders).")
    ],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Which of them, by its name in the recipe.")],
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="The folder of its data set.")],
    split: Annotated[str, typer.Option(help="Which part of it.")] = "val",
    cache: Annotated[
        str | None, typer.Option(help="A cache of these images, where there is no student.")
    ] = None,
    max_images: Annotated[int | None, typer.Option(min=1, help="Measure the first few images.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of one forward pass.")] = 4,
    threads: Annotated[int, typer.Option(min=1, help="Threads that read and render.")] = 2,
    table: Annotated[int | None, typer.Option(help="Show the rows of this table of KPU alone.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a decoder at the size of its images, beside KPU's rows: mIoU, AP of boxes and masks as COCO has
    them, or top-1.

    `accelerate launch -m teachercache.jobs.cli evaluate-decoders …` does the same with several processes.

    Example: `teachercache evaluate-decoders runs/decoders/decoders semseg /data/ADEChallengeData2016`
    """
    from teachercache.pipeline.cache import FeatureCache
    from teachercache.pipeline.errors import require_known
    from teachercache.student.datasets import open_dataset
    from teachercache.student.decoders.model import load_decoders
    from teachercache.student.measuring.decoder_scores import evaluate_decoder, scores_table
    from teachercache.student.measuring.paper_results import kpu_rows

    loaded = load_decoders(decoders)
    require_known("decoder of this run", name, loaded.made_of)
    made = loaded.made_of[name]
    kpu_rows(made["dataset"], made["classes"], (), table)
    scores = evaluate_decoder(
        loaded,
        name,
        open_dataset(made["dataset"], root, split),
        cache=FeatureCache.open(cache) if cache else None,
        max_images=max_images,
        batch_size=batch_size,
        threads=threads,
    )
    if os.environ.get("RANK", "0") == "0":
        rows = kpu_rows(made["dataset"], made["classes"], scores, table)
        print_result(scores, scores_table({str(decoders): scores} | rows), as_json)
