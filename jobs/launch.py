"""What all launchers share: errors as messages, not tracebacks, and the paths of a job on Ray."""

import gc
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from teachercache.pipeline.errors import BuildError, BuildInterruptedError, RecipeError, TeacherCacheError
from teachercache.pipeline.terminal import Terminal

EXIT_FAILED, EXIT_USAGE = 1, 2


def run(main: Callable[[], None]) -> None:
    """Call `main`; our errors end in a message and exit status 1 (2 for a wrong recipe).

    An interrupted build ends at once, even if its threads hang, with 143 after SIGTERM. Any other interrupted
    program ends with 130.
    """
    try:
        main()
    except TeacherCacheError as error:
        kind = "Incomplete" if isinstance(error, BuildError) else "Error"
        console = Terminal(stderr=True)
        console.print(f"{kind}:", style="bold red", end=" ")
        console.print(str(error))
        if isinstance(error, BuildInterruptedError):
            sys.stdout.flush()
            os._exit(error.exit_status)
        raise SystemExit(EXIT_USAGE if isinstance(error, RecipeError) else EXIT_FAILED) from None
    except KeyboardInterrupt:
        print("Interrupted. The same command continues from what was saved.", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        if "torch" not in sys.modules:  # torch's bindings have to be collected
            gc.freeze()  # else Python searches all modules for cycles at exit, a tenth of `inspect`


def require_absolute_in_job(key: str, path: str) -> None:
    """The working folder of a Ray job is a temporary copy: files at a relative path would be lost with it."""
    in_copy = "runtime_resources" in Path.cwd().parts
    if in_copy and "://" not in path and not Path(path).expanduser().is_absolute():
        raise RecipeError(
            "A Ray job needs an absolute path here; its working folder is deleted when it ends.",
            got=f"{key}={path}",
            expected="a path or URL that every node of the cluster sees",
            do=f"override it: {key}=/shared/…",
        )
