"""Distil a student from a teacher cache.

    accelerate launch jobs/train_student.py RECIPE key=value …
    torchrun --nproc_per_node N jobs/train_student.py RECIPE key=value …      (several CPU processes)

RECIPE is a YAML file, or the name of one in jobs/recipes (for example sak_stage1_base). Overrides:

    cache=/data/cache                   the cache to train from
    output=runs/base                    checkpoints, metrics and the finished student
    teachers=[dinov2,sam]               some of the cache's teachers (default: all)
    features=online                     run the teachers instead of reading their features
    batch_size_per_process=16           images per process and micro-batch

Run the same command again after any stop: it continues from the newest checkpoint. SIGTERM saves one
first and ends with status 143.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

if not __package__:  # run as a script: it imports this checkout's packages, installed or not
    sys.path[0] = next(
        str(folder) for folder in Path(__file__).resolve().parents if (folder / "teachercache").is_dir()
    )

from teachercache.jobs.launch import recipe_and_overrides, run
from teachercache.jobs.recipes import find_recipe
from teachercache.student.training.train_recipe import TrainRecipe


def main() -> None:
    path, overrides = recipe_and_overrides(__doc__ or "")
    from teachercache.student.training.train import train

    if train(find_recipe(TrainRecipe, path, overrides)).interrupted:
        raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    run(main)
