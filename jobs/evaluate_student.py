"""Measure a student's tasks with several processes, each of which takes its share of the images.

    accelerate launch jobs/evaluate_student.py STUDENT DATASET ROOT [options]
    torchrun --nproc_per_node N jobs/evaluate_student.py STUDENT DATASET ROOT [options]     (on CPUs)

Arguments and options are those of `teachercache evaluate`.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: it imports this checkout's packages, installed or not
    sys.path[0] = next(
        str(folder) for folder in Path(__file__).resolve().parents if (folder / "teachercache").is_dir()
    )

from teachercache.jobs.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "evaluate")
    main()
