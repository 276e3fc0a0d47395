"""The interface of both runners, and the runner that needs no cluster."""

import logging
import signal
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch

from teachercache.cache_builder.build_recipe import RunnerRecipe
from teachercache.cache_builder.calibrate import Calibration, CalibrationSample
from teachercache.cache_builder.extract import ShardExtractor
from teachercache.cache_builder.worker import Worker
from teachercache.pipeline.errors import (
    BuildError,
    BuildInterruptedError,
    CacheNotFoundError,
    MissingExtraError,
    TeacherCacheError,
    explain,
    place_error,
)
from teachercache.pipeline.records.manifest import CommitRecord
from teachercache.pipeline.records.spec import TeacherSpec
from teachercache.pipeline.stop_request import StopRequest

FINISH_S = 12.0  # for shards in flight after SIGTERM; schedulers give 30 s, preempted machines often less
ABANDON_S = 3.0
TICK_S = 1.0

Teachers = Mapping[str, TeacherSpec]
OnCommit = Callable[[Mapping[str, CommitRecord]], None]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """One shard and what it still lacks: teachers' names, and "images" for the copied images.

    `alone`: a process died with it, so it runs without other shards that would share the blame.
    """

    shard: int
    names: tuple[str, ...]
    attempts: int = 0
    alone: bool = False


_Running = dict[Future[dict[str, CommitRecord]], Task]


class Queue:
    """Waiting shards, and the reasons of those that failed for good. A failed shard is tried again last."""

    def __init__(self, tasks: Sequence[Task], max_attempts: int) -> None:
        self._waiting = deque(tasks)
        self._max_attempts = max_attempts
        self.failed: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self, running: Collection[Task], limit: int) -> Task | None:
        """The next task for a process with these `running`, or None if it has to wait."""
        if not self._waiting or len(running) >= limit or any(task.alone for task in running):
            return None
        if self._waiting[0].alone and running:
            return None
        task = self._waiting.popleft()
        log.debug("shard %d starts, attempt %d", task.shard, task.attempts + 1)
        return task

    def give_back(self, task: Task) -> None:
        """Put back a task that did not end, through no fault of its own."""
        self._waiting.appendleft(task)

    def retry_or_fail(self, task: Task, reason: str, died: bool = False) -> None:
        attempts = task.attempts + 1
        log.warning("shard %d failed, attempt %d of %d: %s", task.shard, attempts, self._max_attempts, reason)
        if attempts < self._max_attempts:
            self._waiting.append(replace(task, attempts=attempts, alone=died))
        else:
            self.failed[task.shard] = reason


class Runner(ABC):
    """Loads the teachers on entering, releases them on leaving. `num_shards`: how many it will get, if known.
    `orphans`: tasks of processes that died, each with the name of its process in commit records."""

    worker: ClassVar[type[Worker]] = Worker

    def __init__(self, recipe: RunnerRecipe, teachers: Teachers, num_shards: int | None = None) -> None:
        self.recipe, self.teachers, self.num_shards = recipe, teachers, num_shards
        self.orphans: list[tuple[Task, str]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def weights_hashes(self) -> dict[str, str]:
        """The hash of every teacher's weights, as the workers loaded them."""
        return self._ask("weights_hashes")

    def calibrate(self, sample: CalibrationSample, names: Collection[str]) -> dict[str, Calibration]:
        """Tables and fidelity of the codecs of the named teachers, by one worker."""
        return self._ask("calibrate", sample, list(names))

    @abstractmethod
    def _ask(self, method: str, *arguments: object) -> Any:
        """What this method of a worker with its teachers gives."""

    @abstractmethod
    def run(self, url: str, images: str, tasks: Sequence[Task], on_commit: OnCommit) -> dict[int, str]:
        """Extract all tasks into the cache at `url`, from `images`; returns why some failed for good.

        SIGTERM and Ctrl-C end it within 20 seconds: shards in flight are finished, or abandoned if that
        takes longer. It then raises `BuildInterruptedError`. Raises `BuildError` when no more files can be
        written to the cache.
        """


class LocalRunner(Runner):
    """One process, `shards_in_flight` threads."""

    def __init__(self, recipe: RunnerRecipe, teachers: Teachers, num_shards: int | None = None) -> None:
        super().__init__(recipe, teachers, num_shards)
        self._worker = self.worker(teachers, recipe)

    def _ask(self, method: str, *arguments: object) -> Any:
        return getattr(self._worker, method)(*arguments)

    def run(self, url: str, images: str, tasks: Sequence[Task], on_commit: OnCommit) -> dict[int, str]:
        extractor = self._worker.open(url, images)
        queue = Queue(tasks, self.recipe.max_attempts)
        running: _Running = {}
        try:
            with StopRequest(signal.SIGTERM, signal.SIGINT) as stop:
                while (queue or running) and not stop.requested:
                    while (task := queue.take(running.values(), self.recipe.shards_in_flight)) is not None:
                        running[_start(extractor, task)] = task
                    self._collect(running, queue, on_commit, url)
                    self._end_if_hung(extractor)
                if stop.signal is not None and (queue or running):
                    deadline = time.monotonic() + FINISH_S
                    while running and time.monotonic() < deadline:
                        self._collect(running, queue, on_commit, url)
                    raise interrupted(stop.signal)
        finally:
            extractor.abandon()
            wait(running, timeout=ABANDON_S)
        return queue.failed

    def _collect(self, running: _Running, queue: Queue, on_commit: OnCommit, url: str) -> None:
        finished, _ = wait(running, timeout=TICK_S, return_when=FIRST_COMPLETED)
        for future in finished:
            task, error = running.pop(future), future.exception()
            if error is None:
                on_commit(future.result())
            elif not isinstance(error, Exception):
                raise error
            else:
                require_place(error, url, self.recipe.batch_size)
                queue.retry_or_fail(task, describe(error))

    def _end_if_hung(self, extractor: ShardExtractor) -> None:
        hung = {s: idle for s, idle in extractor.idle_s().items() if idle > self.recipe.stall_timeout_s}
        if hung:
            shards = ", ".join(map(str, sorted(hung)))
            raise BuildInterruptedError(
                "The build hangs; everything before is committed.",
                got=f"no progress in shard {shards} for {max(hung.values()):.0f} s",
                expected=f"a batch within runner.stall_timeout_s={self.recipe.stall_timeout_s:g}",
                do="run the same command again, or with runner.kind=ray, which replaces processes that hang",
            )


def _start(extractor: ShardExtractor, task: Task) -> Future[dict[str, CommitRecord]]:
    """Run in a daemon thread: otherwise a teacher that hangs would keep the process alive forever."""
    future: Future[dict[str, CommitRecord]] = Future()

    def work() -> None:
        try:
            future.set_result(extractor.extract(task.shard, task.names))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name=f"shard {task.shard}", daemon=True).start()
    return future


def interrupted(number: signal.Signals) -> BuildInterruptedError:
    error = BuildInterruptedError(
        f"{number.name} ended the build; everything committed stays.",
        do="run the same command again; it computes only what is missing",
    )
    error.exit_status = 128 + number
    return error


def require_place(error: Exception, url: str, batch_size: int = 1) -> None:
    """Raise for an error that hits the next shard as well: of the cache's place, of what is not installed, or
    of a full GPU."""
    if isinstance(error, CacheNotFoundError | MissingExtraError):
        raise error
    if (words := place_error(error, url)) is not None:
        raise BuildError(
            "No more files can be written to the cache; everything committed stays.", **words
        ) from error
    if isinstance(error, torch.OutOfMemoryError):
        smaller = f"set runner.batch_size={batch_size // 2}, or " if batch_size > 1 else ""
        raise BuildError(
            "A batch does not fit the memory of this GPU; everything committed stays.",
            got=str(error).splitlines()[0],
            expected=f"room for the teachers and a batch of {batch_size} views",
            do=f"{smaller}take a larger GPU, or one that nothing else uses",
        ) from error


def describe(error: BaseException) -> str:
    """A readable reason: our errors speak for themselves, others need the line that raised them."""
    if (words := place_error(error, "")) is not None:
        return explain("No more files can be written there.", **words)
    if isinstance(error, TeacherCacheError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ else None
    where = f" ({place.filename}:{place.lineno})" if place else ""
    return f"{type(error).__name__}: {error}{where}"
