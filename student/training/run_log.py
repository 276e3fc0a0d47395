"""What a run says while it goes on: `metrics.jsonl`, TensorBoard and the line on the terminal."""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO

from accelerate import Accelerator
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from teachercache.pipeline.terminal import Terminal
from teachercache.student.saving import replacing, saving
from teachercache.student.timing import bottleneck

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """One line of JSON for each step; every `every_steps` their means go to TensorBoard, with the bottleneck
    in words. A context manager.

    `pictures`, by tag, are asked for and go to TensorBoard every `picture_every_steps`, where that is not 0,
    and after the last step. Steps that a resumed run takes again are removed from what was written before.
    Only the main process writes, each time after `before_writing`, which ends the run by raising.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output: Path,
        *,
        first_step: int,
        total_steps: int,
        every_steps: int,
        pictures: Callable[[], Mapping[str, NDArray]] = dict,
        picture_every_steps: int = 0,
        before_writing: Callable[[], None] = lambda: None,
    ) -> None:
        self._accelerator = accelerator
        self._file_path = output / METRICS_FILE
        self._first_step = first_step
        self._total_steps = total_steps
        self._every_steps = every_steps
        self._pictures = pictures
        self._picture_every_steps = picture_every_steps
        self._before_writing = before_writing
        self._recent: list[Mapping[str, float]] = []
        self._file: IO[str] | None = None
        self._console = Terminal(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (accelerator.is_main_process and self._console.is_terminal),
        )

    def __enter__(self) -> RunLog:
        self._accelerator.init_trackers(
            "tensorboard", init_kwargs={"tensorboard": {"purge_step": self._first_step}}
        )
        if self._accelerator.is_main_process:
            with saving(METRICS_FILE, self._file_path):
                self._file = self._reopen()
        self._entered = time.monotonic()
        self._progress.start()
        self._task = self._progress.add_task("train", total=self._total_steps, completed=self._first_step)
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        with saving("What the run logs", self._file_path.parent):
            if self._file is not None:
                self._file.close()
            for tracker in self._accelerator.trackers:
                tracker.finish()

    def draws(self, step: int) -> bool:
        """Whether pictures of the student as it is after `step` are due."""
        return self._is_due(step, self._picture_every_steps)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._file is None:
            return
        self._before_writing()
        pictures = self._pictures() if self.draws(step) else None
        with saving("What the run logs", self._file_path.parent):
            self._write(self._file, step, values, pictures)

    def _write(
        self,
        file: IO[str],
        step: int,
        values: Mapping[str, float],
        pictures: Mapping[str, NDArray] | None,
    ) -> None:
        file.write(json.dumps({"step": step, **values}) + "\n")
        file.flush()
        self._recent.append(values)
        line = _in_words(values)
        self._progress.update(self._task, completed=step + 1, description=line)
        for tracker in self._accelerator.trackers if pictures is not None else ():
            tracker.log_images(pictures, step, dataformats="NHWC")
        if self._is_due(step, self._every_steps):
            means = {key: sum(row[key] for row in self._recent) / len(self._recent) for key in values}
            seconds = {key.removeprefix("seconds/"): mean for key, mean in means.items()}
            self._accelerator.log({**means, "bottleneck": bottleneck(seconds, steps=1)}, step=step)
            self._recent.clear()
            if not self._console.is_terminal:
                a_step = (time.monotonic() - self._entered) / (step + 1 - self._first_step)
                left = timedelta(seconds=round(a_step * (self._total_steps - step - 1)))
                line = f"step {step + 1}/{self._total_steps} · {_in_words(means)} · {left} left"
                self._console.print(line, highlight=False)

    def _is_due(self, step: int, every_steps: int) -> bool:
        return every_steps > 0 and ((step + 1) % every_steps == 0 or step + 1 == self._total_steps)

    def _reopen(self) -> IO[str]:
        lines = self._file_path.read_bytes().split(b"\n") if self._file_path.exists() else [b""]
        kept, last, again, garbage = list[bytes](), -1, 0, 0
        for line, step in _steps(lines):
            if step <= last:
                garbage += line is not lines[-1]  # behind the last line break: torn when a process ended
                continue
            last = step
            if step < self._first_step:
                kept.append(line)
            else:
                again += 1
        if again:
            self._console.print(f"{again} steps that no checkpoint holds are taken again")
        if garbage:
            self._console.print(f"{garbage} lines of {METRICS_FILE} cannot be read and go")
        with replacing(self._file_path) as file:
            file.write_bytes(b"".join(line + b"\n" for line in kept))
        return self._file_path.open("a")


def _in_words(values: Mapping[str, float]) -> str:
    """Loss, by teacher too where there are several, learning rate and speed."""
    levels = defaultdict[str, list[float]](list)
    for key, value in values.items():
        if match := re.fullmatch(r"loss/(.+)/level\d+", key):
            levels[match[1]].append(value)
    by_teacher = ", ".join(f"{name} {sum(parts):.4f}" for name, parts in levels.items())
    loss = f"loss {values['loss']:.4f}" + (f" ({by_teacher})" if len(levels) > 1 else "")
    return f"{loss} · lr {values['lr']:.2e} · {values['images_per_s']:.1f} img/s"


def logged_steps(output: Path) -> int:
    """How many steps a run has logged."""
    file = output / METRICS_FILE
    lines = file.read_bytes().split(b"\n") if file.is_file() else []
    return 1 + max((step for _, step in _steps(lines)), default=-1)


def _steps(lines: Sequence[bytes]) -> Iterator[tuple[bytes, int]]:
    """Each line with its step, -1 for what is no line that was written here."""
    for line in lines:
        try:
            row = json.loads(line)
            step = row["step"] if type(row["loss"]) is float else -1
        except (ValueError, TypeError, KeyError, RecursionError):
            step = -1
        yield line, step if type(step) is int else -1
