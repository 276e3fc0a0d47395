"""Experiments of many parts that run side by side, write down their results, and resume."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

SETTINGS = "settings.json"
Settings = TypeVar("Settings")


def parse(
    description: str, output: Path, defaults: Settings, smoke: Settings
) -> tuple[argparse.Namespace, Settings]:
    """The command line of a miniature, and its settings: a dataclass of numbers, each of which is an
    option."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual, short = (asdict(cast(Any, one)) for one in (defaults, smoke))
    parser.add_argument("--seeds", type=int, help="how often everything is done anew (3; with --smoke 1)")
    parser.add_argument("--output", type=Path, default=output, help=f"folder ({output})")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto takes a GPU if any")
    parser.add_argument(
        "--processes", type=int, default=max(1, min(8, os.cpu_count() or 1)), help="that train side by side"
    )
    parser.add_argument("--smoke", action="store_true", help="a few steps on a few scenes")
    for key, value in usual.items():
        shown = f"{value:g} (with --smoke {short[key]:g})"
        parser.add_argument(f"--{key.replace('_', '-')}", type=type(value), help=shown)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # every part takes the accelerator that it finds
    if arguments.seeds is None:
        arguments.seeds = 1 if arguments.smoke else 3
    given = {key: value for key in usual if (value := getattr(arguments, key)) is not None}
    stated = (short if arguments.smoke else usual) | given
    if min(arguments.seeds, arguments.processes, *stated.values()) <= 0:
        parser.error("every number must be greater than 0")
    if stated["batch_size"] > min(stated["scenes"], stated["labelled_scenes"]):
        parser.error(f"a batch of {stated['batch_size']} takes more scenes than there are to train on")
    return arguments, type(defaults)(**stated)


@dataclass(frozen=True)
class Study:
    """Parts of an experiment in one folder. A part is a method and the name that it is called with; what it
    returns is JSON in `results/`, and it is not done again."""

    folder: Path

    @property
    def log(self) -> Path:
        """What the parts say while they run; their progress bars would share one terminal."""
        return self.folder / "log.txt"

    def result(self, what: str) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(self._result(what).read_text())
        return result

    def is_done(self, step: str, name: str) -> bool:
        return self._result(f"{step}, {name}").exists()

    def do(self, step: str, name: str) -> float:
        """Do one part and write down what it found; returns the seconds that it took."""
        file, started = self._result(f"{step}, {name}"), time.perf_counter()
        file.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log, redirect_stdout(log), redirect_stderr(log):
            result = getattr(self, step)(name) or {}
        seconds = time.perf_counter() - started
        temporary = file.with_suffix(".partial")
        temporary.write_text(json.dumps(result | {"seconds": seconds}) + "\n")
        temporary.replace(file)
        return seconds

    def _result(self, what: str) -> Path:
        return self.folder / "results" / f"{what.replace(',', '').replace(' ', '_')}.json"


def run_all(studies: Sequence[Study], phases: Mapping[str, Sequence[str]], processes: int) -> None:
    """Every phase of every study, its parts side by side, with a line for each that is done.

    A phase needs the one before, but for its own parts nothing.
    """
    left = {
        step: [(study, name) for name in names for study in studies if not study.is_done(step, name)]
        for step, names in phases.items()
    }
    total, done, started = sum(map(len, left.values())), 0, time.perf_counter()
    threads = max(1, (os.cpu_count() or 1) // processes)
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        try:
            for step, parts in left.items():
                running = {pool.submit(study.do, step, name): (study, name) for study, name in parts}
                for part in as_completed(running):
                    (study, name), seconds = running[part], part.result()
                    done += 1
                    line = f"{study.folder.name}, {step.replace('_', ' ')}: {name} ({seconds:.0f} s)"
                    print(f"[{done}/{total}, {time.perf_counter() - started:.0f} s] {line}", file=sys.stderr)
        except BaseException:  # Ctrl-C too: what has not begun is for the next time
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def claim_folder(output: Path, settings: Any) -> None:
    """One folder holds one experiment, or its parts would not be of the same one. `settings`: a dataclass; of
    what an older folder does not state, the defaults hold."""
    stated = json.dumps(asdict(settings), indent=2) + "\n"
    file = output / SETTINGS
    usual = json.loads(json.dumps(asdict(type(settings)())))
    if file.exists() and usual | json.loads(file.read_text()) != json.loads(stated):
        sys.exit(f"{file} states another experiment than this command: choose another --output, or delete it")
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(stated)


def spread(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """Mean ± standard deviation."""
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
