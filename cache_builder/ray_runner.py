"""The runner on a Ray cluster.

Plain actors, fed from a queue of shards, return only commit records: features go from the actor to the
store. An actor that dies (its process, its node, preemption) or hangs is replaced, and its shards in flight
are queued again; extraction is idempotent, so running one twice is harmless. Actors beyond what the nodes
have room for wait for nodes: Ray starts them when some join, and its autoscaler sees them until then.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.metrics import Counter, Gauge

from teachercache.cache_builder.build_recipe import RunnerRecipe
from teachercache.cache_builder.extract import ShardExtractor, worker_name
from teachercache.cache_builder.progress import STAGES
from teachercache.cache_builder.ray_cluster import Head, Need, as_ours, connect, last_line
from teachercache.cache_builder.runner import (
    ABANDON_S,
    FINISH_S,
    TICK_S,
    OnCommit,
    Queue,
    Runner,
    Task,
    Teachers,
    describe,
    interrupted,
    log,
    require_place,
)
from teachercache.cache_builder.teachers.registry import teacher_gmacs
from teachercache.cache_builder.worker import Worker, device_of
from teachercache.pipeline.errors import BuildInterruptedError
from teachercache.pipeline.places.cores import stay_near
from teachercache.pipeline.records.manifest import CommitRecord
from teachercache.pipeline.records.spec import TeacherSpec
from teachercache.pipeline.stop_request import StopRequest

_LOOK_AROUND_EVERY_S = 2.0
_PULSE_EVERY_S = 5.0
_SAY_AGAIN_S = 60.0
_ANSWER_S = 1.0
_WATCH = "watch"
_LARGE_GMACS = 100.0  # a view through all teachers: seconds of a CPU core, milliseconds of a GPU
_LONG_GMACS = 1e6  # all views: many hours of a CPU core, where nodes with GPUs may come
_AHEAD = 8  # actors that may wait for nodes; more where more nodes are there, so that a cluster doubles


class RayWorker(Worker):
    """A worker that finishes its shards on SIGTERM."""

    def __init__(self, teachers: Mapping[str, TeacherSpec], runner: RunnerRecipe) -> None:
        # Of an error in the constructor of an actor, Ray would pass on the text alone.
        self._load = partial(super().__init__, teachers, runner)
        self._device = runner.device
        self._extractor: ShardExtractor | None = None
        self._leaving = False
        signal.signal(signal.SIGTERM, self._leave)

    def load(self) -> dict[str, str]:
        """Load the teachers, near their GPU. Returns the hash of every one's weights."""
        if (device := device_of(self._device)).startswith("cuda"):
            stay_near(torch.cuda.get_device_properties(device))
        self._load()
        return self.weights_hashes()

    def fill(self, url: str, images: str, loaded: object) -> str:
        """Open the cache to extract shards into, after `loaded`. Returns this process's name in records."""
        self._extractor = self.open(url, images)
        return worker_name()

    def idle_s(self) -> dict[int, float]:
        return self._extractor.idle_s() if self._extractor is not None else {}

    def extract(self, shard: int, names: Collection[str]) -> dict[str, CommitRecord]:
        assert self._extractor is not None, "fill() comes first"
        if self._leaving:
            raise BuildInterruptedError("This process has to end; it takes no more shards.")
        return self._extractor.extract(shard, names)

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


@dataclass(eq=False)
class _Actor:
    """An actor of the pool, and its pending calls: `loaded` answers once it has a node and its teachers,
    `opening` precedes any shard and gives its `name`, `ping` is its pulse."""

    handle: Any
    gpus: float
    loaded: Any
    opening: Any
    name: str = ""
    running: dict[Any, Task] = field(default_factory=dict)
    ping: Any = None
    asked: float = field(default_factory=time.monotonic)
    leaving: bool = False


class RayRunner(Runner):
    """As many actors as the shards can occupy (or `num_actors`), each with all teachers loaded."""

    worker: ClassVar[type[Worker]] = RayWorker

    def __init__(
        self, recipe: RunnerRecipe, teachers: Teachers, num_shards: int | None = None, num_rows: int = 0
    ) -> None:
        super().__init__(recipe, teachers, num_shards)
        self._connected_here = not ray.is_initialized()
        self._nodes_may_join = not (self._connected_here and connect())
        self._head = Head()
        self._seconds = Counter("teachercache_stage_seconds", "Of all threads, by stage.", ("actor", "stage"))
        self._committed = Counter("teachercache_shards", "Shards committed.", ("actor",))
        self._views = Counter("teachercache_views", "Views computed.", ("actor",))
        self._shards = Gauge("teachercache_build_shards", "Shards of a build by state.", ("state",))
        self._waiting = Gauge("teachercache_build_actors_waiting", "Actors that wait for a node, or load.")
        self._place: tuple[str, str] | None = None
        asks = () if recipe.gpus_per_actor is not None else teachers.values()
        gmacs = sum(map(teacher_gmacs, asks))
        self._is_large = gmacs >= _LARGE_GMACS or (self._nodes_may_join and gmacs * num_rows >= _LONG_GMACS)
        if asks and self._nodes_may_join and not self._need().gpus:
            log.warning("the build computes on CPUs until GPUs come; runner.gpus_per_actor=1 asks for GPUs")
        self._failed_starts, self._said_to_wait = 0, -math.inf
        self._actors: list[_Actor] = []
        self._fit_to_nodes()

    def __exit__(self, *_: object) -> None:
        if self._head.is_gone():  # every call to Ray would hang
            return
        for actor in self._actors:
            ray.kill(actor.handle)
        if self._connected_here:
            ray.shutdown()

    def _ask(self, method: str, *arguments: object) -> Any:
        """Others come for actors that die first."""
        while True:
            actor = self._first_loaded()
            try:
                ray.get(actor.loaded)
                return ray.get(getattr(actor.handle, method).remote(*arguments))
            except RayTaskError as error:
                raise as_ours(error) from error
            except RayError as error:
                self._count_failed_start(actor, error)
                log.warning("replacing an actor that died before the first shard: %s", last_line(error))
                self._end(actor)
                self._fit_to_nodes()

    def run(self, url: str, images: str, tasks: Sequence[Task], on_commit: OnCommit) -> dict[int, str]:
        self._place = url, images
        queue = Queue(tasks, self.recipe.max_attempts)
        for actor in self._actors:
            actor.opening = actor.handle.fill.remote(url, images, actor.loaded)
        looked_around = -math.inf
        with StopRequest(signal.SIGTERM, signal.SIGINT) as stop:
            while (queue or self._running()) and not stop.requested:
                for actor in list(self._actors):
                    self._feed(actor, queue)
                self._collect(queue, on_commit)
                for actor in list(self._actors):
                    self._feel_pulse(actor, queue)
                if time.monotonic() - looked_around > _LOOK_AROUND_EVERY_S:
                    if self._head.answers():
                        self._show_progress(queue)
                        self._fit_to_nodes()
                    looked_around = time.monotonic()
            if stop.signal is not None and (queue or self._running()):
                deadline = time.monotonic() + FINISH_S
                while self._running() and time.monotonic() < deadline:
                    self._collect(queue, on_commit)
                raise interrupted(stop.signal)
        return queue.failed

    def _running(self) -> int:
        return sum(len(actor.running) for actor in self._actors)

    def _show_progress(self, queue: Queue) -> None:
        self.num_shards = len(queue) + self._running()
        states = {"waiting": len(queue), "running": self._running(), "failed": len(queue.failed)}
        for state, count in states.items():
            self._shards.set(count, {"state": state})

    def _feed(self, actor: _Actor, queue: Queue) -> None:
        if actor.leaving and not actor.running:
            self._end(actor)
        while actor.opening is None and not actor.leaving:
            task = queue.take(actor.running.values(), self.recipe.shards_in_flight)
            if task is None:
                return
            actor.running[actor.handle.extract.remote(task.shard, task.names)] = task

    def _collect(self, queue: Queue, on_commit: OnCommit) -> None:
        owners = {call: actor for actor in self._actors for call in actor.running}
        owners |= {actor.opening: actor for actor in self._actors if actor.opening is not None}
        if not owners:
            time.sleep(TICK_S)
            return
        finished, _ = ray.wait(list(owners), num_returns=1, timeout=TICK_S)
        for call in finished:
            self._take(owners[call], call, queue, on_commit)

    def _take(self, actor: _Actor, call: Any, queue: Queue, on_commit: OnCommit) -> None:
        try:
            answer = ray.get(call)
        except RayActorError as error:
            self._count_failed_start(actor, error)
            self._lose(actor, f"the process that ran it died: {last_line(error)}", queue)
        except RayTaskError as error:
            if call is actor.opening:  # an actor that cannot open the cache cannot extract
                raise as_ours(error) from error
            cause = error.cause if isinstance(error.cause, Exception) else error
            task = actor.running.pop(call)
            if isinstance(cause, BuildInterruptedError):
                actor.leaving = True
                queue.give_back(task)
                return
            assert self._place is not None
            require_place(cause, self._place[0], self.recipe.batch_size)
            queue.retry_or_fail(task, describe(cause))
        except RayError as error:  # its answer went with a node; its commits stay
            self._lose(actor, f"its answer was lost: {last_line(error)}", queue)
        else:
            if call is actor.opening:
                actor.opening, actor.name = None, answer
                for other in self._actors if actor.gpus else ():  # CPUs retire when GPUs work
                    other.leaving |= not other.gpus
            else:
                del actor.running[call]
                self._count(answer)
                on_commit(answer)

    def _count(self, records: Mapping[str, CommitRecord]) -> None:
        """In Ray's metrics."""
        for record in list(records.values())[:1]:  # all of them count the same views
            actor = {"actor": record.worker}
            for stage in STAGES:
                if record.seconds[stage] > 0:  # Ray refuses to add zero
                    self._seconds.inc(record.seconds[stage], actor | {"stage": stage})
            self._committed.inc(1, actor)
            self._views.inc(record.num_rows, actor)

    def _lose(self, actor: _Actor, reason: str, queue: Queue) -> None:
        log.warning("replacing an actor with %d shards: %s", len(actor.running), reason)
        for task in actor.running.values():
            self.orphans.append((task, actor.name))
            queue.retry_or_fail(task, reason, died=True)
        self._end(actor)

    def _end(self, actor: _Actor) -> None:
        ray.kill(actor.handle)  # it may just be unreachable
        self._actors.remove(actor)

    def _count_failed_start(self, dead: _Actor, error: RayError) -> None:
        """Give up when actors keep dying before they have opened the cache."""
        self._failed_starts = self._failed_starts + 1 if dead.opening is not None else 0
        if self._failed_starts >= self.recipe.max_attempts * max(1, self._room):
            raise as_ours(error) from error

    def _feel_pulse(self, actor: _Actor, queue: Queue) -> None:
        """Replace an actor in which a shard hangs, or that does not answer at all."""
        patience = self.recipe.stall_timeout_s
        waited = time.monotonic() - actor.asked
        if actor.opening is not None or not actor.running:
            actor.asked, actor.ping = time.monotonic(), None
        elif actor.ping is None:
            if waited > min(patience / 4, _PULSE_EVERY_S):
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

    def _first_loaded(self) -> _Actor:
        """An actor that has its teachers, or died of them."""
        with StopRequest(signal.SIGTERM, signal.SIGINT) as stop:
            while stop.signal is None:
                loaded = {actor.loaded: actor for actor in self._actors}
                finished, _ = ray.wait(list(loaded), num_returns=1, timeout=TICK_S)
                if finished:
                    return loaded[finished[0]]
                if self._head.answers():
                    self._fit_to_nodes()
        raise interrupted(stop.signal)

    def _fit_to_nodes(self) -> None:
        """Start the actors that are wanted, and end waiting ones that are not any more."""
        need = self._need()
        self._room = need.room(self._nodes_may_join, self._place is not None)
        if not self._room and time.monotonic() - self._said_to_wait > _SAY_AGAIN_S:
            log.warning("waiting for a node with %s; runner.gpus_per_actor=0 computes on CPUs", need)
            self._said_to_wait = time.monotonic()
        alike = [actor for actor in self._actors if actor.gpus == need.gpus]
        missing = self._wanted_actors(need) - len(alike)
        self._actors += [self._start_actor(need) for _ in range(missing)]
        waiting = [actor for actor in reversed(alike) if actor.opening is not None]
        for actor in waiting[: max(0, -missing)]:
            self._end(actor)
        self._waiting.set(sum(actor.opening is not None for actor in self._actors))

    def _start_actor(self, need: Need) -> _Actor:
        options: dict[str, Any] = {
            "name": f"{'+'.join(self.teachers)} {uuid.uuid4().hex[:8]}",
            "num_cpus": need.cpus,
            "num_gpus": need.gpus,
            "max_concurrency": self.recipe.shards_in_flight,
            "concurrency_groups": {_WATCH: 1},
        }
        handle = ray.remote(**options)(self.worker).remote(dict(self.teachers), self.recipe)
        loaded = handle.load.remote()
        opening = loaded if self._place is None else handle.fill.remote(*self._place, loaded)
        return _Actor(handle, need.gpus, loaded, opening)

    def _need(self) -> Need:
        gpus = self.recipe.gpus_per_actor
        if gpus is None:
            gpus = 1.0 if self._is_large or ray.cluster_resources().get("GPU") else 0.0
        return Need(self.recipe.cpus_per_actor, gpus)

    def _wanted_actors(self, need: Need) -> int:
        """What the shards can occupy, up to twice the room; on CPUs until GPUs come, only what has room."""
        if self.recipe.num_actors is not None:
            return self.recipe.num_actors
        if self.num_shards is None:
            return max(1, self._room)
        is_makeshift = self.recipe.gpus_per_actor is None and not need.gpus
        most = self._room if is_makeshift else self._room + max(_AHEAD, self._room)
        return max(1, min(most, -(-self.num_shards // self.recipe.shards_in_flight)))
