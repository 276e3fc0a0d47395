"""What a run says while it goes on: `metrics.jsonl`, TensorBoard and the line on the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from accelerate import Accelerator
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.processes import TEMPORARY_SUFFIX
from pipeline.terminal import Terminal
from student.timing import bottleneck

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """One line of JSON for each step; every `every_steps` their means go to TensorBoard, with the bottleneck
    in words. A context manager.

    `pictures`, by tag, are asked for and go to TensorBoard every `picture_every_steps`, where that is not 0,
    and after the last step. Steps that a resumed run takes again are removed from what was written before.
    Only the main process writes.
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
    ) -> None:
        self._accelerator = accelerator
        self._file_path = output / METRICS_FILE
        self._first_step = first_step
        self._total_steps = total_steps
        self._every_steps = every_steps
        self._pictures = pictures
        self._picture_every_steps = picture_every_steps
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
            self._file = self._reopen()
        self._progress.start()
        self._task = self._progress.add_task("train", total=self._total_steps, completed=self._first_step)
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if self._file is not None:
            self._file.close()
        for tracker in self._accelerator.trackers:
            tracker.finish()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        self._recent.append(values)
        line = f"loss {values['loss']:.4f} · {values['images_per_s']:.1f} img/s"
        self._progress.update(self._task, completed=step + 1, description=line)
        if self._is_due(step, self._picture_every_steps):
            for tracker in self._accelerator.trackers:
                tracker.log_images(self._pictures(), step, dataformats="NHWC")
        if self._is_due(step, self._every_steps):
            means = {key: sum(row[key] for row in self._recent) / len(self._recent) for key in values}
            seconds = {key.removeprefix("seconds/"): mean for key, mean in means.items()}
            self._accelerator.log({**means, "bottleneck": bottleneck(seconds, steps=1)}, step=step)
            self._recent.clear()
            if not self._console.is_terminal:
                self._console.print(f"step {step + 1}/{self._total_steps} · {line}", highlight=False)

    def _is_due(self, step: int, every_steps: int) -> bool:
        return every_steps > 0 and ((step + 1) % every_steps == 0 or step + 1 == self._total_steps)

    def _reopen(self) -> IO[str]:
        kept: list[str] = []
        if self._file_path.exists():
            whole = [line for line in self._file_path.read_text().splitlines(True) if line.endswith("\n")]
            kept = [line for line in whole if json.loads(line)["step"] < self._first_step]
        temporary = self._file_path.with_suffix(TEMPORARY_SUFFIX)
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text("".join(kept))
        temporary.replace(self._file_path)
        return self._file_path.open("a")
