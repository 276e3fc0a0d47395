"""The interface of the two runners, and the one that needs no cluster."""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Self

from cache_builder.calibrate import Calibration, CalibrationSample
from cache_builder.recipe import RunnerRecipe
from cache_builder.worker import Worker
from pipeline.errors import TeacherCacheError
from pipeline.manifest import CommitRecord
from pipeline.spec import TeacherSpec

OnCommit = Callable[[Mapping[str, CommitRecord]], None]


@dataclass(frozen=True)
class Task:
    """One shard and who is still missing in it: teachers' names, and "images" for the copied images."""

    shard: int
    names: tuple[str, ...]
    attempts: int = 0

    def retry(self) -> Task:
        return Task(self.shard, self.names, self.attempts + 1)


@dataclass(frozen=True)
class FailedShard:
    """A shard that failed as often as the recipe allows."""

    shard: int
    reason: str


class Runner(ABC):
    """Loads the teachers on entering, gives them back on leaving."""

    def __init__(self, recipe: RunnerRecipe, teachers: Mapping[str, TeacherSpec]) -> None:
        self.recipe, self.teachers = recipe, teachers

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(self, *_: object) -> None: ...

    @abstractmethod
    def weights_hashes(self) -> dict[str, str]:
        """Hash of every teacher's weights as the workers loaded them."""

    @abstractmethod
    def calibrate(self, sample: CalibrationSample, names: Collection[str]) -> dict[str, Calibration]:
        """Tables and fidelity of the codecs of the named teachers, by one worker."""

    @abstractmethod
    def run(self, url: str, tasks: Sequence[Task], on_commit: OnCommit) -> list[FailedShard]:
        """Extract all tasks into the cache at `url`; returns those that failed for good."""

    def retry_or_fail(self, task: Task, reason: str, queue: deque[Task], failed: list[FailedShard]) -> None:
        if task.attempts + 1 < self.recipe.max_attempts:
            queue.append(task.retry())
        else:
            failed.append(FailedShard(task.shard, reason))


class LocalRunner(Runner):
    """One process, `shards_in_flight` threads."""

    def __init__(self, recipe: RunnerRecipe, teachers: Mapping[str, TeacherSpec]) -> None:
        super().__init__(recipe, teachers)
        self._worker = Worker(teachers, recipe)

    def __exit__(self, *_: object) -> None:
        return None

    def weights_hashes(self) -> dict[str, str]:
        return self._worker.weights_hashes()

    def calibrate(self, sample: CalibrationSample, names: Collection[str]) -> dict[str, Calibration]:
        return self._worker.calibrate(sample, names)

    def run(self, url: str, tasks: Sequence[Task], on_commit: OnCommit) -> list[FailedShard]:
        self._worker.open(url)
        queue, failed = deque(tasks), list[FailedShard]()
        running: dict[Future[dict[str, CommitRecord]], Task] = {}
        with ThreadPoolExecutor(self.recipe.shards_in_flight, thread_name_prefix="shard") as pool:
            while queue or running:
                while queue and len(running) < self.recipe.shards_in_flight:
                    task = queue.popleft()
                    running[pool.submit(self._worker.extract, task.shard, task.names)] = task
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    task = running.pop(future)
                    error = future.exception()
                    if error is None:
                        on_commit(future.result())
                    elif not isinstance(error, Exception):
                        raise error
                    else:
                        self.retry_or_fail(task, describe(error), queue, failed)
        return failed


def describe(error: BaseException) -> str:
    """A reason for people: our errors speak for themselves, others need the place they came from."""
    if isinstance(error, TeacherCacheError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ else None
    where = f" ({place.filename}:{place.lineno})" if place else ""
    return f"{type(error).__name__}: {error}{where}"
