"""Build a teacher cache on a Ray cluster: what `teachercache submit RECIPE key=value …` runs there.

Arguments are those of `teachercache build`. Run the same command again after any failure: it computes only
what is missing.
"""

import os
import sys
from pathlib import Path

if not __package__:  # run as a script: it imports this checkout's packages, installed or not
    sys.path[0] = next(
        str(folder) for folder in Path(__file__).resolve().parents if (folder / "teachercache").is_dir()
    )
    # So do the workers of a cluster that it starts.
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{sys.path[0]}{os.pathsep}{path}" if path else sys.path[0]

from teachercache.jobs.cli import main

if __name__ == "__main__":
    main("build", "runner.kind=ray")
