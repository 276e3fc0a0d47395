"""What a run says while it goes on: `metrics.jsonl`, its trackers and the line on the terminal."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from numpy.typing import NDArray

from teachercache.pipeline.errors import RecipeError, extra

with extra("train"):
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from teachercache.pipeline.records.manifest import SPEC_NAME
from teachercache.pipeline.terminal import Terminal, progress_bar
from teachercache.student.saving import replacing, saving
from teachercache.student.similarity import Similarity
from teachercache.student.timing import bottleneck

if TYPE_CHECKING:
    from teachercache.pipeline.cache import FeatureCache
    from teachercache.student.training.run import Run

METRICS_FILE = "metrics.jsonl"
_WHAT = "What the run logs"
PICTURES: dict[str, dict[str, Any]] = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}, "swanlab": {}}
"""Arguments of `log_images`, of trackers that take pictures (N, H, W, 3) uint8 by tag."""
_KEEP_FILE: dict[str, Callable[[Any, str], object]] = {
    "wandb": lambda tracker, file: tracker.tracker.log_artifact(file, name="cache", type="dataset"),
    "mlflow": lambda tracker, file: tracker.log_artifact(file),
    "comet_ml": lambda tracker, file: tracker.tracker.log_asset(file),
    "clearml": lambda tracker, file: tracker.tracker.upload_artifact("cache", file),
}


@dataclass
class RunLog:
    """One line of JSON for each step; every `log_every_steps` their means go to the trackers, with the
    bottleneck in words, and to the log where there is no terminal. A context manager.

    `pictures`, by tag, and what `validate` measures, the similarity to each teacher, are asked for when the
    recipe says so, and after the last step: pictures of the main process, similarities of all. Steps that a
    resumed run takes again are removed from what was written before. Only the main process writes, each time
    after `run.require_held`. `cache`: as of `start_trackers`.
    """

    run: Run
    pictures: Callable[[], Mapping[str, NDArray]]
    validate: Callable[[], dict[str, Similarity]] | None
    cache: FeatureCache | None

    def __post_init__(self) -> None:
        run = self.run
        self.recipe, self.first_step, self.total_steps = run.recipe, run.first_step, run.total_steps
        shown, validation = PICTURES.keys() & set(self.recipe.trackers), self.recipe.validation
        self._draw_every_steps = self.recipe.picture_every_steps if shown else 0
        self._validate_every_steps = validation.every_steps if validation else 0
        self._output = Path(self.recipe.output)
        self._recent: list[Mapping[str, float]] = []
        self._file: IO[str] | None = None
        self._trackers: list[GeneralTracker] = []
        self.similarity: dict[str, Similarity] = {}
        self._console = Terminal(stderr=True)
        hidden = not (run.accelerator.is_main_process and self._console.is_terminal)
        self._progress = progress_bar(self._console, disable=hidden)

    def __enter__(self) -> RunLog:
        if self.run.accelerator.is_main_process:
            with saving(_WHAT, self._output):
                self._trackers = start_trackers(
                    self.recipe.trackers, self._output, self.run.identity, self.cache, self.first_step
                )
                self._file = self._reopen()
        self._entered = time.monotonic()
        self._progress.start()
        self._task = self._progress.add_task("train", total=self.total_steps, completed=self.first_step)
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        with saving(_WHAT, self._output):
            if self._file is not None:
                self._file.close()
            for tracker in self._trackers:
                tracker.finish()

    def looks(self, step: int) -> bool:
        """Whether pictures or similarities of the student as it is after `step` are due."""
        return self._is_due(step, self._draw_every_steps) or self._is_due(step, self._validate_every_steps)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """By every process, since all of them validate."""
        due = self._is_due(step, self._validate_every_steps)
        similarity = self.validate() if self.validate and due else {}
        self.similarity = similarity or self.similarity
        if self._file is None:
            return
        self.run.require_held()
        pictures = self.pictures() if self._is_due(step, self._draw_every_steps) else {}
        told = dict[str, float | str]()
        for name, one in similarity.items():
            told[f"similarity/{name}"] = one.mean
            told |= {f"similarity/{name}/level{level}": value for level, value in enumerate(one.levels)}
        with saving(_WHAT, self._output):
            self._file.write(json.dumps({"step": step, **values, **told}) + "\n")
            self._file.flush()
            self._recent.append(values)
            self._progress.update(self._task, completed=step + 1, description=self._in_words(step, values))
            if similarity:
                found = ", ".join(f"{name} {one.mean:.4f}" for name, one in similarity.items())
                self._tell(step, f"similarity on held-out images: {found}")
            if self._is_due(step, self.recipe.log_every_steps):
                told |= self._take_means(step, values)
            numbers = {key: value for key, value in told.items() if not isinstance(value, str)}
            for tracker in self._trackers:
                if pictures and tracker.name in PICTURES:
                    tracker.log_images(pictures, step, **PICTURES[tracker.name])
                if told:  # most take numbers alone
                    shown = told if tracker.name == "tensorboard" else numbers
                    tracker.log(names_for(tracker.name, shown), step)

    def _take_means(self, step: int, values: Mapping[str, float]) -> dict[str, float | str]:
        """Of the steps since the last time, said where there is no terminal, and the bottleneck in words."""
        means = {key: sum(row[key] for row in self._recent) / len(self._recent) for key in values}
        seconds = {key.removeprefix("seconds/"): mean for key, mean in means.items()}
        self._recent.clear()
        if not self._console.is_terminal:
            a_step = (time.monotonic() - self._entered) / (step + 1 - self.first_step)
            minutes, rest = divmod(round(a_step * (self.total_steps - step - 1)), 60)
            left = f"{minutes // 60}:{minutes % 60:02}:{rest:02} left"
            self._tell(step, f"{self._in_words(step, means)} · {left}")
        epoch = (step + 1) / self.run.steps_per_epoch
        return {**means, "epoch": epoch, "bottleneck": bottleneck(seconds, steps=1)}

    def _tell(self, step: int, words: str) -> None:
        self._console.print(f"step {step + 1}/{self.total_steps} · {words}")

    def _in_words(self, step: int, values: Mapping[str, float]) -> str:
        """Epoch, loss, by teacher and task too where there are several, learning rate and speed."""
        parts = defaultdict[str, list[float]](list)
        for key, value in values.items():
            if key.startswith("loss/"):
                parts[key.split("/")[1]].append(value)
        by_part = ", ".join(f"{name} {sum(terms):.4f}" for name, terms in parts.items())
        epochs = (done / self.run.steps_per_epoch for done in (step + 1, self.total_steps))
        return (
            "epoch {:.2f}/{:.2f} · ".format(*epochs)
            + f"loss {values['loss']:.4f}{f' ({by_part})' if len(parts) > 1 else ''}"
            + f" · lr {values['lr']:.2e} · {values['images_per_s']:.1f} img/s"
        )

    def _is_due(self, step: int, every_steps: int) -> bool:
        return every_steps > 0 and ((step + 1) % every_steps == 0 or step + 1 == self.total_steps)

    def _reopen(self) -> IO[str]:
        path = self._output / METRICS_FILE
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        kept, last, again, garbage = list[bytes](), -1, 0, 0
        for line, step in _steps(lines):
            if step <= last:
                garbage += line is not lines[-1]  # behind the last line break: torn when a process ended
                continue
            last = step
            if step < self.first_step:
                kept.append(line)
            else:
                again += 1
        if again:
            self._console.print(f"{again} steps after the last checkpoint are repeated")
        if garbage:
            self._console.print(f"{garbage} lines of {METRICS_FILE} cannot be read and are dropped")
        with replacing(path) as file:
            file.write_bytes(b"".join(line + b"\n" for line in kept))
        return path.open("a")


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


def missing_trackers(names: Sequence[str]) -> Iterator[RecipeError]:
    """Those whose package is not installed."""
    installed = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in installed:
            yield RecipeError(
                "The package of a tracker is not installed.",
                got=f"trackers: {name}",
                expected=f"one of {', '.join(installed) or 'none'}",
                do=f"pip install {name.replace('aim', 'aim<4')!r}, or take it out of trackers",
            )


def names_for(tracker: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """`values` by names that the tracker takes: to MLflow each is a file, which cannot be a folder too."""
    return {key.replace("/", "."): one for key, one in values.items()} if tracker == "mlflow" else values


def start_trackers(
    names: Sequence[str], output: Path, config: Mapping[str, Any], cache: FeatureCache | None, first_step: int
) -> list[GeneralTracker]:
    """On the main process. `config` is what the run is, flat, and is stored by each; those that have
    artifacts keep `cache.json`. Raises `RecipeError` where one does not start."""
    trackers = list[GeneralTracker]()
    config = {**config, "cache_id": cache.spec.cache_id} if cache else config
    run_name = output.resolve().name
    settings: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": first_step},
        "wandb": {"name": run_name, "dir": str(output)},
        "mlflow": {"run_name": run_name},
        "swanlab": {"experiment_name": run_name},
        "trackio": {"name": run_name},
    }
    for name in names:
        kind = LOGGER_TYPE_TO_CLASS[name]
        place = [output] if kind.requires_logging_directory else []
        try:
            project = {"tensorboard": name, "aim": run_name}.get(name, "teachercache")
            tracker = kind(project, *place, **settings.get(name, {}))
            tracker.start()
            if name == "tensorboard":  # whose own form of a configuration is a run beside the run
                tracker.log({"config": "".join(f"    {key}: {config[key]}\n" for key in config)}, first_step)
            else:
                plain = {key: str(one) if isinstance(one, list) else one for key, one in config.items()}
                tracker.store_init_configuration(plain)
            if cache is not None and name in _KEEP_FILE:
                (output / SPEC_NAME).write_bytes(cache.storage.read(SPEC_NAME))
                _KEEP_FILE[name](tracker, str(output / SPEC_NAME))
        except OSError:
            raise
        except Exception as error:  # each has its own
            raise RecipeError(
                f"The tracker {name} does not start.",
                got=f"{type(error).__name__}: {error}",
                expected="a service that answers, and an account that is logged in to it",
                do="log in, or take it out of trackers",
            ) from error
        trackers.append(tracker)
    return trackers
