"""accelerate launch jobs/train_student.py RECIPE key=value …

Several CPU processes: torchrun --nproc_per_node N jobs/train_student.py RECIPE key=value …
Exits with 143 when SIGTERM ended the run early; the same command then continues it.
"""

from __future__ import annotations

import signal
import sys

from pipeline.errors import TeacherCacheError
from pipeline.recipe import load_recipe
from student.recipe import TrainRecipe
from student.train import train


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    try:
        result = train(load_recipe(TrainRecipe, arguments[0], arguments[1:]))
    except TeacherCacheError as error:
        print(error, file=sys.stderr)
        return 1
    return 128 + signal.SIGTERM if result.interrupted else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
