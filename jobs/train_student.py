"""Distil a student from a teacher cache with several processes.

    accelerate launch jobs/train_student.py RECIPE key=value …
    torchrun --nproc_per_node N jobs/train_student.py RECIPE key=value …      (on CPUs)

Arguments are those of `teachercache train`. Run the same command again after any stop: it continues from the
newest checkpoint. SIGTERM saves one first and ends with status 143.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: it imports this checkout's packages, installed or not
    sys.path[0] = next(
        str(folder) for folder in Path(__file__).resolve().parents if (folder / "teachercache").is_dir()
    )

from teachercache.jobs.cli import main

if __name__ == "__main__":
    main("train")
