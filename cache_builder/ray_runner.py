"""The runner on a Ray cluster.

Plain actors, fed from a queue of shards, return only commit records: features go from the actor to the
store. An actor that dies (its process, its node, preemption) or hangs is replaced, and its shards in flight
are queued again; extraction is idempotent, so running one twice is harmless.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.metrics import Counter, Gauge

from teachercache.cache_builder.build_recipe import RunnerRecipe
from teachercache.cache_builder.calibrate import Calibration, CalibrationSample
from teachercache.cache_builder.extract import ShardExtractor, worker_name
from teachercache.cache_builder.ray_cluster import Head, answer_of, connect
from teachercache.cache_builder.runner import (
    ABANDON_S,
    FINISH_S,
    TICK_S,
    FailedShard,
    OnCommit,
    Queue,
    Runner,
    Task,
    describe,
    interrupted,
    log,
    require_place,
)
from teachercache.cache_builder.stages import STAGES
from teachercache.cache_builder.worker import Worker
from teachercache.pipeline.errors import BuildError, BuildInterruptedError
from teachercache.pipeline.records.manifest import CommitRecord
from teachercache.pipeline.records.spec import TeacherSpec
from teachercache.pipeline.stop_request import StopRequest

_LOOK_AROUND_EVERY_S = 5.0
_ANSWER_S = 1.0
_WATCH = "watch"


class RayWorker(Worker):
    """A worker that reports to Ray's metrics, and finishes its shards on SIGTERM."""

    def __init__(self, teachers: Mapping[str, TeacherSpec], runner: RunnerRecipe) -> None:
        super().__init__(teachers, runner)
        self._extractor: ShardExtractor | None = None
        self._metrics = _Metrics()
        self._leaving = False
        signal.signal(signal.SIGTERM, self._leave)

    def fill(self, url: str, images: str) -> str:
        """Open the cache to extract shards into. Returns this process's name in commit records."""
        self._extractor = self.open(url, images)
        return worker_name()

    def idle_s(self) -> dict[int, float]:
        return self._extractor.idle_s() if self._extractor is not None else {}

    def extract(self, shard: int, names: Collection[str]) -> dict[str, CommitRecord]:
        assert self._extractor is not None, "fill() comes first"
        if self._leaving:
            raise BuildInterruptedError("This process has to end; it takes no more shards.")
        self._metrics.start()
        records = self._extractor.extract(shard, names)
        for record in list(records.values())[:1]:  # all of them count the same views
            self._metrics.add(record)
        return records

    def _leave(self, *_: object) -> None:
        self._leaving = True
        threading.Thread(target=self._finish_and_go, daemon=True).start()

    def _finish_and_go(self) -> None:
        self._wait_for_shards(FINISH_S)
        if self._extractor is not None:
            self._extractor.abandon()
        self._wait_for_shards(ABANDON_S)
        time.sleep(_ANSWER_S)
        os._exit(128 + signal.SIGTERM)

    def _wait_for_shards(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self.idle_s() and time.monotonic() < deadline:
            time.sleep(0.05)


class _Metrics:
    """The work of each actor, at the Prometheus endpoint of its node."""

    def __init__(self) -> None:
        keys = ("actor",)
        self._seconds = Counter(
            "teachercache_stage_seconds", "Seconds by stage, summed over threads.", (*keys, "stage")
        )
        self._shards = Counter("teachercache_shards", "Shards committed.", keys)
        self._views = Counter("teachercache_views", "Views computed.", keys)
        self._rate = Gauge("teachercache_views_per_second", "Views a second since the first shard.", keys)
        self._tags = {"actor": worker_name()}
        self._started: float | None = None
        self._total = 0
        self._lock = threading.Lock()

    def start(self) -> None:
        with self._lock:
            self._started = self._started or time.monotonic()

    def add(self, record: CommitRecord) -> None:
        with self._lock:
            self._total += record.num_rows
            assert self._started is not None
            rate = self._total / (time.monotonic() - self._started)
        for stage in STAGES:
            if record.seconds[stage] > 0:  # Ray refuses to add zero
                self._seconds.inc(record.seconds[stage], self._tags | {"stage": stage})
        self._shards.inc(1, self._tags)
        self._views.inc(record.num_rows, self._tags)
        self._rate.set(rate, self._tags)


@dataclass(eq=False)
class _Actor:
    """An actor of the pool, and its pending calls: `opening` precedes any shard, `ping` is its pulse.

    `name` is the answer to `opening`.
    """

    handle: Any
    opening: Any = None
    name: str = ""
    running: dict[Any, Task] = field(default_factory=dict)
    ping: Any = None
    asked: float = field(default_factory=time.monotonic)
    leaving: bool = False


class RayRunner(Runner):
    """As many actors as fit the nodes and the shards can occupy (or `num_actors`), each with all teachers
    loaded."""

    worker: ClassVar[type[Worker]] = RayWorker

    def __init__(
        self, recipe: RunnerRecipe, teachers: Mapping[str, TeacherSpec], num_shards: int | None = None
    ) -> None:
        super().__init__(recipe, teachers, num_shards)
        self._connected_here = not ray.is_initialized()
        if self._connected_here:
            connect()
        self._head = Head()
        self._failed_starts = 0
        self._place: tuple[str, str] | None = None
        self._require_room()
        self._actors = [self._start_actor() for _ in range(self._wanted_actors())]

    def __exit__(self, *_: object) -> None:
        if self._head.is_gone():  # every call to Ray would hang
            return
        for actor in self._actors:
            ray.kill(actor.handle)
        if self._connected_here:
            ray.shutdown()

    def weights_hashes(self) -> dict[str, str]:
        hashes: dict[str, str] = answer_of(self._actors[0].handle.weights_hashes.remote())
        return hashes

    def calibrate(self, sample: CalibrationSample, names: Collection[str]) -> dict[str, Calibration]:
        sent = self._actors[0].handle.calibrate.remote(sample, list(names))
        calibrations: dict[str, Calibration] = answer_of(sent)
        return calibrations

    def run(self, url: str, images: str, tasks: Sequence[Task], on_commit: OnCommit) -> list[FailedShard]:
        self._place = url, images
        queue = Queue(tasks, self.recipe.max_attempts)
        for actor in self._actors:
            actor.opening = actor.handle.fill.remote(url, images)
        looked_around = time.monotonic()
        with StopRequest(signal.SIGTERM, signal.SIGINT) as stop:
            while (queue or self._running()) and not stop.requested:
                for actor in self._actors:
                    self._feed(actor, queue)
                self._collect(queue, on_commit)
                for actor in list(self._actors):
                    self._feel_pulse(actor, queue)
                if time.monotonic() - looked_around > _LOOK_AROUND_EVERY_S:
                    if self._head.answers():
                        self._use_new_nodes()
                    looked_around = time.monotonic()
            if stop.signal is not None and (queue or self._running()):
                deadline = time.monotonic() + FINISH_S
                while self._running() and time.monotonic() < deadline:
                    self._collect(queue, on_commit)
                raise interrupted(stop.signal)
        return queue.failed

    def _running(self) -> bool:
        return any(actor.running for actor in self._actors)

    def _feed(self, actor: _Actor, queue: Queue) -> None:
        if actor.leaving and not actor.running:
            self._replace(actor)
        while actor.opening is None and not actor.leaving:
            task = queue.take(actor.running.values(), self.recipe.shards_in_flight)
            if task is None:
                return
            actor.running[actor.handle.extract.remote(task.shard, task.names)] = task

    def _collect(self, queue: Queue, on_commit: OnCommit) -> None:
        owners = {call: actor for actor in self._actors for call in actor.running}
        owners |= {actor.opening: actor for actor in self._actors if actor.opening is not None}
        finished, _ = ray.wait(list(owners), num_returns=1, timeout=TICK_S)
        for call in finished:
            self._take(owners[call], call, queue, on_commit)

    def _take(self, actor: _Actor, call: Any, queue: Queue, on_commit: OnCommit) -> None:
        try:
            answer = ray.get(call)
        except RayActorError as error:
            self._count_failed_start(actor, error)
            self._lose(actor, f"the process that ran it died: {error}", queue)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if call is actor.opening:  # an actor that cannot open the cache cannot extract
                raise cause from error
            task = actor.running.pop(call)
            if isinstance(cause, BuildInterruptedError):
                actor.leaving = True
                queue.give_back(task)
                return
            assert self._place is not None
            require_place(cause, self._place[0])
            queue.retry_or_fail(task, describe(cause))
        except RayError as error:  # its answer went with a node; its commits stay
            self._lose(actor, f"its answer was lost: {error}", queue)
        else:
            if call is actor.opening:
                actor.opening, actor.name = None, answer
            else:
                del actor.running[call]
                on_commit(answer)

    def _lose(self, actor: _Actor, reason: str, queue: Queue) -> None:
        log.warning("replacing an actor with %d shards: %s", len(actor.running), reason)
        for task in actor.running.values():
            self.orphans.append((task, actor.name))
            queue.retry_or_fail(task, reason, died=True)
        self._replace(actor)

    def _replace(self, actor: _Actor) -> None:
        ray.kill(actor.handle)  # it may just be unreachable
        self._actors[self._actors.index(actor)] = self._start_actor()

    def _count_failed_start(self, dead: _Actor, error: RayActorError) -> None:
        """Give up when actors keep dying before they have opened the cache."""
        self._failed_starts = self._failed_starts + 1 if dead.opening is not None else 0
        if self._failed_starts >= self.recipe.max_attempts * len(self._actors):
            raise BuildError(
                "The Ray actors die before they can open the cache.",
                got=str(error),
                expected="actors that load the teachers and open the cache",
                do="look at the actors' logs (ray logs); memory and missing packages are the usual causes",
            ) from error

    def _feel_pulse(self, actor: _Actor, queue: Queue) -> None:
        """Replace an actor in which a shard hangs, or that does not answer at all."""
        patience = self.recipe.stall_timeout_s
        waited = time.monotonic() - actor.asked
        if actor.opening is not None or not actor.running:
            actor.asked, actor.ping = time.monotonic(), None
        elif actor.ping is None:
            if waited > min(patience / 4, _LOOK_AROUND_EVERY_S):
                actor.ping = actor.handle.idle_s.options(concurrency_group=_WATCH).remote()
                actor.asked = time.monotonic()
        elif ray.wait([actor.ping], timeout=0)[0]:
            with contextlib.suppress(RayError):  # its shards report its death
                idle_s = max(ray.get(actor.ping).values(), default=0.0)
                if idle_s > patience:
                    self._lose(actor, f"no progress for {idle_s:.0f} s", queue)
            actor.ping = None
        elif waited > patience:
            self._lose(actor, f"its process did not answer for {waited:.0f} s", queue)

    def _use_new_nodes(self) -> None:
        missing = self._wanted_actors() - len(self._actors)
        self._actors += [self._start_actor() for _ in range(missing)]

    def _start_actor(self) -> _Actor:
        options: dict[str, Any] = {
            "num_cpus": self.recipe.cpus_per_actor,
            "num_gpus": self._gpus_per_actor(),
            "max_concurrency": self.recipe.shards_in_flight,
            "concurrency_groups": {_WATCH: 1},
        }
        handle = ray.remote(**options)(self.worker).remote(dict(self.teachers), self.recipe)
        return _Actor(handle, None if self._place is None else handle.fill.remote(*self._place))

    def _gpus_per_actor(self) -> float:
        if self.recipe.gpus_per_actor is not None:
            return self.recipe.gpus_per_actor
        return 1.0 if ray.cluster_resources().get("GPU") else 0.0

    def _wanted_actors(self) -> int:
        if self.recipe.num_actors is not None:
            return self.recipe.num_actors
        need = {"CPU": self.recipe.cpus_per_actor, "GPU": self._gpus_per_actor()}
        room = sum(
            min(int(node["Resources"].get(name, 0) / count) for name, count in need.items() if count)
            for node in ray.nodes()
            if node["Alive"]
        )
        if self.num_shards is None:
            return room
        return min(room, max(1, -(-self.num_shards // self.recipe.shards_in_flight)))

    def _require_room(self) -> None:
        if not self._wanted_actors():
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            have = (f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
            raise BuildError(
                "No node of this Ray cluster has room for one actor.",
                got=f"nodes of {', '.join(sorted(set(have)))}",
                expected=f"one with {self.recipe.cpus_per_actor:g} CPUs and {self._gpus_per_actor():g} GPUs",
                do="start larger nodes, or lower runner.cpus_per_actor and runner.gpus_per_actor",
            )
